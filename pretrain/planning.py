"""What a run will do, told before it starts."""

from torch import nn


def describe(
    parts: dict[str, nn.Module], images: int, batch: int, steps: int, layout: tuple[int, int], lr: float, start: str
) -> str:
    """Sizes and lengths in words.

    parts: modules by name, whose parameters are counted. images: of the data set. batch: global. layout: processes,
    images of a micro-batch. lr: peak learning rate. start: what the weights start from.
    """
    processes, micro = layout
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items())
    return (
        f"parameters: {sizes}; start: {start}\n"
        f"{images:,} images, {steps:,} steps of {batch} = {steps * batch / images:.2f} epochs; "
        f"{processes} process(es) x {batch // processes // micro} micro-batch(es) x {micro} images; "
        f"peak learning rate {lr:.2e}"
    )
