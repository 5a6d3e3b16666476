"""P x K batches of image-sentence pairs: 32 people with 4 annotations each in the paper (arXiv 2110.10807).

A pair is one sentence with its image, so an image with two sentences is two pairs. People pass by as in sampling.py.
"""

from typing import NamedTuple

import numpy as np

from finetune.sampling import epoch_batches


class PairBatches(NamedTuple):
    """The batches of an epoch, the K pairs of a person adjacent."""

    images: np.ndarray  # int64 [batches, P * K], places of the images in `labels`
    sentences: np.ndarray  # int64 [batches, P * K], places of the sentences in `owners`


def pair_batches(labels: np.ndarray, owners: np.ndarray, shape: tuple[int, int], seed: int, epoch: int) -> PairBatches:
    """A pure function of its arguments. A person with fewer than K pairs gives K drawn with replacement.

    labels: int64 [N], the identity of each image. owners: int64 [S], the image of each sentence; images without any are
    in no batch. shape: P people a batch, K pairs of each. UserError where fewer than P people have a sentence.
    """
    sentences = epoch_batches(labels[owners], *shape, seed, epoch)
    return PairBatches(owners[sentences], sentences)
