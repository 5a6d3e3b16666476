"""ResNets of other re-identification projects: fast-reid, torchreid, the strong baseline of BoT.

Their networks are timm's ResNet but for details that change every feature: how the stem pools, whether it has a ReLU,
and instance normalisation in half of the channels (IBN). `reid_resnet` is timm's model with these details as arguments.
"""

import re
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import register_model
from torch import Tensor, nn

from pretrain.stem import IBN
from recipes.errors import UserError

# bottleneck blocks?, blocks of the four stages -> depth, as in timm's names
DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
# parts of keys -> what a ResNet with them has that timm's has not
UNKNOWN_PARTS = {
    r"(^|\.)NL_\d": "non-local blocks (AGW and SBS of fast-reid)",
    r"\.se\.": "squeeze-and-excitation",
    r"(^|\.)b\d+\.": "branches (MGN)",
}


@register_model
def reid_resnet(
    pretrained: bool = False,
    depth: int = 50,
    ibn: bool = False,
    stem_act: bool = True,
    stem_padding: int = 1,
    **given: Any,
) -> nn.Module:
    """timm's ResNet of that depth. ibn: IBN-a in the blocks of the first three stages (Pan et al. 2018, arXiv
    1807.09441). stem_act: the ReLU between the first BatchNorm and the pooling. stem_padding: of the 3 x 3 pooling
    after it: 1 as in torchvision, or 0, where the last window may stand over the edge."""
    assert not pretrained, "weights come from a checkpoint"
    model = timm.create_model(f"resnet{depth}", **given)
    if not stem_act:
        model.act1 = nn.Identity()
    if not stem_padding:
        model.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    if ibn:
        for block in (*model.layer1, *model.layer2, *model.layer3):
            block.bn1 = IBN(block.bn1.num_features)
    return model


def arguments_of(tensors: Mapping[str, Tensor], where: str, **details: Any) -> dict[str, Any]:
    """Arguments of finetune/backbones.build for weights by timm's names.

    details: stem_act, stem_padding where they are not timm's; last_stride. UserError for another network.
    """
    for pattern, what in UNKNOWN_PARTS.items():
        strange = next((key for key in tensors if re.search(pattern, key)), None)
        if strange:
            raise UserError(f"{where} has {what} ({strange}), which are not built here; the file is refused")
    stages = [{key.split(".")[1] for key in tensors if key.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    shape = "layer1.0.conv3.weight" in tensors, tuple(map(len, stages))
    if shape not in DEPTHS:
        raise UserError(f"{where} holds no ResNet that is known here: its stages have {shape[1]} blocks")
    ibn = {"ibn": True} if any(".bn1.IN." in key for key in tensors) else {}
    stride = {"last_stride": details.pop("last_stride")}
    if not ibn and not details:
        return {"model_name": f"resnet{DEPTHS[shape]}", "num_classes": 0, **stride}
    return {"model_name": "reid_resnet", "num_classes": 0, "depth": DEPTHS[shape], **ibn, **details, **stride}
