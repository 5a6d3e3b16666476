"""The text encoder: maximum over the words, and no influence of what stands beside a sentence."""

import pytest
import torch

from finetune.text_encoder import TextEncoder, TextEncoderConfig, trimmed

LONGEST, DIM = 9, 6


def encoder(**more) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TextEncoderConfig(hidden=5, **more), DIM, LONGEST).eval()


def sentences(*lengths: int, width: int = LONGEST) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors and numbers of sentences; sentence n is the same whatever the others are."""
    numbers = torch.zeros(len(lengths), width, dtype=torch.int64)
    vectors = torch.zeros(len(lengths), width, DIM)
    for row, length in enumerate(lengths):
        numbers[row, :length] = 1
        own = torch.randn(LONGEST, DIM, generator=torch.Generator().manual_seed(row))
        vectors[row, :length] = own[:length]
    return vectors, numbers


def test_a_sentence_has_the_same_feature_alone_and_beside_longer_ones():
    model = encoder()
    alone = model(*sentences(3, width=3))
    together = model(*sentences(3, 9, 1))
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=0)
    vectors, numbers = sentences(3, 9, 1)
    torch.testing.assert_close(model(vectors.flip(0), numbers.flip(0)).flip(0), together, atol=1e-6, rtol=0)


def test_the_maximum_over_the_zeros_of_a_batch_would_depend_on_it():
    """What the published code does, and why it is not done here."""
    model = encoder()
    vectors, numbers = sentences(3, 9)
    states = model.gru(vectors)[0] * (numbers != 0)[:, :, None]
    alone = model.gru(vectors[:1, :3])[0]
    assert (states[0].amax(dim=0) - alone[0].amax(dim=0)).abs().max() > 0.01


def test_the_feature_is_the_maximum_over_a_loop_of_steps():
    model = encoder()
    vectors, numbers = sentences(4)
    cell = {way: torch.nn.GRUCell(DIM, 5, bias=False).requires_grad_(False) for way in ("", "_reverse")}
    states = []
    for way, order in (("", range(4)), ("_reverse", reversed(range(4)))):
        cell[way].weight_ih.copy_(getattr(model.gru, f"weight_ih_l0{way}"))
        cell[way].weight_hh.copy_(getattr(model.gru, f"weight_hh_l0{way}"))
        state, seen = torch.zeros(1, 5), []
        for place in order:
            state = cell[way](vectors[:, place], state)
            seen.append(state)
        states.append(torch.stack(seen).amax(dim=0))
    torch.testing.assert_close(model(vectors, numbers), torch.cat(states, dim=1))


def test_with_zeros_a_short_sentence_is_never_negative_and_a_full_one_is_as_before():
    plain, zeros = encoder(), encoder(padding="zeros")
    given = sentences(3, LONGEST, 1)
    ours, theirs = plain(*given), zeros(*given)
    assert (ours[[0, 2]] < 0).any(), "or this test shows nothing"
    torch.testing.assert_close(theirs[[0, 2]], ours[[0, 2]].clamp(min=0))
    torch.testing.assert_close(theirs[1], ours[1])


@pytest.mark.parametrize("padding", ["masked", "zeros"])
def test_more_padding_changes_no_gradient_of_a_weight(padding):
    found = []
    for width in (4, LONGEST):
        model = encoder(padding=padding)
        model(*sentences(4, 2, width=width)).square().sum().backward()
        found.append([weight.grad for weight in model.parameters()])
        assert all(gradient.abs().sum() > 0 for gradient in found[-1])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("width", [5, LONGEST])
def test_trimmed_cuts_what_is_padding_for_all(width):
    numbers = torch.zeros(2, width, dtype=torch.int64)
    numbers[0, :3], numbers[1, :1] = 4, 2
    assert trimmed(numbers).tolist() == [[4, 4, 4], [2, 0, 0]]
