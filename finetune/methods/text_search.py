"""Person search by sentences with limited data, CM-MoCo (Han et al. 2021, arXiv 2110.10807).

Image -> backbone -> 256 numbers; sentence -> vectors of its words -> Bi-GRU -> maximum -> 256 numbers; cosine. The
losses compare a pair with the keys of slowly moving copies (InfoNCE against queues), align the pairs of the batch, and
tell identities apart by one matrix for both. Without the queues (`cross_modal_losses.nce_weight: 0`) it is the paper's
baseline, and with `sdm_weight` the loss of IRRA (arXiv 2303.12501) takes their place.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from finetune.cross_modal import CrossModalConfig
from finetune.cross_modal_losses import (
    CrossModalLossesConfig,
    SharedIdentities,
    alignment,
    info_nce,
    similarity_distribution,
)
from finetune.id_losses import GatheredFeatures, gathered, processes
from finetune.identities import Identities
from finetune.methods.base import Features, ImageBatch, Method, Parts, Plan
from finetune.momentum_encoders import MomentumEncoders, MomentumEncodersConfig
from finetune.necks import NecksConfig, Pooling
from finetune.pair_sampling import pair_batches
from finetune.queues import Queues, QueuesConfig
from finetune.text_encoder import TextEncoder, TextEncoderConfig, trimmed
from finetune.word_table import WordTable, WordTableConfig, find
from finetune.words import Lexicon, Sentences, Vocabulary, WordsConfig, encode_captions, frequent_words
from recipes.errors import UserError
from recipes.load import Section

READS_CAPTIONS = True
Part = Callable[[str], nn.Module]
NAMED = 10  # unknown words of the training captions that are named on the terminal


class Config(Section):
    """Both encoders, the space they meet in, losses, queues."""

    necks: NecksConfig = NecksConfig()
    mean_beside: bool = False  # the image feature is the pooled one with the mean of the patches beside it
    dim: int = Field(256, ge=2)  # F, of the space that images and sentences share
    words: WordsConfig = WordsConfig()
    word_table: WordTableConfig = WordTableConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    cross_modal_losses: CrossModalLossesConfig = CrossModalLossesConfig()
    queues: QueuesConfig = QueuesConfig()
    momentum_encoders: MomentumEncodersConfig = MomentumEncodersConfig()
    cross_modal: CrossModalConfig = CrossModalConfig()
    lexicon: Lexicon | None = None  # the words of a stored model; a training finds its own, so recipes leave it away


class TextSearch(Method):
    """Two encoders, two projections, the shared identities; queues and momentum encoders while it trains."""

    def __init__(self, config: Config, parts: Parts):
        super().__init__(parts)
        self.config, self.second_look = config, config.cross_modal
        self.pooling = Pooling(config.necks, self.backbone.dim)
        alone = config.necks.pooling in (None, "cls") and not config.mean_beside
        self.patches = "none" if alone else "all"  # of a ViT the last block then runs on CLS alone
        given = config.lexicon
        if given is None:
            assert parts.captions is not None, "READS_CAPTIONS asks for them"
            captions = parts.captions()
            given = find(config.word_table, lambda: frequent_words(captions, config.words.min_count))
        self.table = WordTable(config.word_table, given)
        self.vocabulary = Vocabulary(self.table.words)
        self.sentences = None if config.lexicon else self.numbers(captions)  # of the training images
        self.text_encoder = TextEncoder(config.text_encoder, self.table.dim, config.words.longest)
        self.image_projection = nn.Linear(self.pooling.dim + config.mean_beside * self.backbone.dim, config.dim)
        self.text_projection = nn.Linear(self.text_encoder.dim, config.dim)
        weights = config.cross_modal_losses
        self.shared = SharedIdentities(config.dim, parts.classes) if weights.identity_weight else None
        self.queues: Queues | None = None
        self.keys: MomentumEncoders | None = None

    def apart(self) -> Mapping[str, Any]:
        """Queues and momentum encoders, which begin as copies of the encoders at the first call."""
        if not self.config.cross_modal_losses.nce_weight:
            return {}
        if self.queues is None:
            config, names = self.config.momentum_encoders, ["backbone", "pooling", "text_encoder"]
            names += ["table"] if self.config.word_table.kind == "trainable" else []
            names += ["image_projection", "text_projection"] if config.projection else []
            self.keys = MomentumEncoders({name: getattr(self, name) for name in names}, config.momentum)
            self.queues = Queues(self.config.queues, self.config.dim, self.seed)
        return {"queues": self.queues, "momentum_encoders": self.keys}

    def exported(self, section: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The words go with the model."""
        return self.state_dict(), {**section, "lexicon": self.table.lexicon.model_dump(mode="json")}

    def epoch(self, number: int, identities: Identities, features: Features) -> Plan:
        """P x K pairs; a sentence goes with its image."""
        if not identities.classes:
            raise UserError("text_search learns identities; leave identities.labels away")
        sentences = self.sentences
        if sentences is None:
            raise UserError("method.lexicon is what a stored model tells about its words; leave it away in a recipe")
        assert sentences.owners[-1] < len(identities.rows), "the captions are those of the rows"
        shape = self.sampling.identities_per_batch, self.sampling.images_per_identity
        found = pair_batches(identities.labels, sentences.owners, shape, self.seed, number)
        notes = () if number else (_sentence(sentences, len(self.vocabulary)),)
        return Plan(found.images, identities.labels, notes=notes, words=sentences.numbers[found.sentences])

    def _images(self, images: Tensor, drops: Tensor | None, part: Part) -> Tensor:
        """Images [B, 3, H, W] -> float32 [B, F], not normalised. part: finds the modules by name."""
        tokens = part("backbone")(images, drops=drops, patches=self.patches)
        pooled = part("pooling")(tokens)
        if self.config.mean_beside:
            pooled = torch.cat([pooled, tokens.patches.float().mean(dim=1)], dim=1)
        with torch.autocast(images.device.type, enabled=False):
            return part("image_projection")(pooled.float())

    def _texts(self, words: Tensor, part: Part) -> Tensor:
        """Word numbers int64 [B, L] -> float32 [B, F], not normalised. part: finds the modules by name."""
        words = trimmed(words)
        with torch.autocast(words.device.type, enabled=False):
            return part("text_projection")(part("text_encoder")(part("table")(words), words))

    def _own(self, name: str) -> nn.Module:
        return getattr(self, name)

    def _copy(self, name: str) -> nn.Module:
        return self.keys.copies[name] if name in self.keys.copies else getattr(self, name)

    @torch.no_grad()
    def _keys(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Keys of the images and of the sentences, L2-normalised [B, F] each. The momentum encoders move first."""
        self.apart()
        self.queues.to(batch.images.device)
        self.keys.to(batch.images.device)
        self.keys.update()
        self.keys.copies.train(self.training)
        images, texts = self._images(batch.images, None, self._copy), self._texts(batch.words, self._copy)
        return F.normalize(images, dim=1), F.normalize(texts, dim=1)

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        assert batch.words is not None, "its plans have words"
        weights, labels = self.config.cross_modal_losses, batch.labels
        images, texts = self._images(batch.images, batch.drops, self._own), self._texts(batch.words, self._own)
        v, t = F.normalize(images, dim=1), F.normalize(texts, dim=1)
        losses = {}
        if weights.nce_weight:
            image_keys, text_keys = self._keys(batch)
            negatives = self.queues.negatives(gathered(labels))
            there = info_nce(v, text_keys, self.queues.texts, negatives, weights.temperature)
            back = info_nce(t, image_keys, self.queues.images, negatives, weights.temperature)
            losses["nce"] = weights.nce_weight * (there + back)
            if self.training:
                self.queues.remember(image_keys, text_keys, labels)
        if processes() > 1:
            v, t, everyone = GatheredFeatures.apply(v), GatheredFeatures.apply(t), gathered(labels)
        else:
            everyone = labels
        if weights.alignment_weight:
            losses["alignment"] = weights.alignment_weight * alignment(v, t, everyone, weights)
        if weights.sdm_weight:
            found = similarity_distribution(v, t, everyone, weights.sdm_temperature)
            losses["sdm"] = weights.sdm_weight * found
        if self.shared is not None:
            both = [self.shared(each, labels, weights.label_smoothing) for each in (images, texts)]
            losses["identity"] = weights.identity_weight * sum(both)
        return losses

    def end_step(self) -> None:
        if self.queues is not None:
            self.queues.push()

    def embed(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        return F.normalize(self._images(images, None, self._own), dim=1)

    def embed_words(self, words: Tensor) -> Tensor:
        """Word numbers int64 [B, L], padded at the end -> L2-normalised features [B, F], comparable with `embed`."""
        return F.normalize(self._texts(words, self._own), dim=1)

    def numbers(self, captions: Sequence[Sequence[str]]) -> Sentences:
        """The captions of each image in word numbers."""
        return encode_captions(self.vocabulary, captions, self.config.words.longest)

    @torch.no_grad()
    def embed_sentences(self, texts: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
        """Sentences -> float32 [S, F], L2-normalised, and the words that are unknown and left out. UserError for a
        sentence without any known word."""
        rows, unknown = self.vocabulary.rows(texts, self.config.words.longest)
        words = torch.from_numpy(rows).to(self.table.vectors.device)
        return self.embed_words(words).float().cpu().numpy(), unknown


def _sentence(sentences: Sentences, words: int) -> str:
    """About the captions, for the terminal."""
    told = f"{len(sentences.owners)} captions, {words} words in the table"
    if sentences.unknown:
        more = len(sentences.unknown) - NAMED
        told += f"; not in it and left out: {', '.join(sentences.unknown[:NAMED])}" + (
            f" and {more} more" if more > 0 else ""
        )
    return told + (f"; {sentences.left_out} captions had no known word" if sentences.left_out else "")


def build(config: Config, parts: Parts) -> TextSearch:
    """Called by finetune.methods.build."""
    return TextSearch(config, parts)
