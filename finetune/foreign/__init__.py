"""Models that other projects fine-tuned for person re-identification."""
