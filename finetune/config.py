"""The recipe of a fine-tune: composes the configs of the parts."""

from typing import Any, Literal

from pydantic import Field

from finetune.augment import AugmentConfig
from finetune.backbones import BackboneConfig
from finetune.benchmark import BenchmarkConfig
from finetune.identities import IdentitiesConfig
from finetune.optim import OptimConfig
from finetune.rerank import RerankConfig
from finetune.resume import ResumeConfig
from finetune.sampling import SamplingConfig
from finetune.validation import ValidationConfig
from pretrain.ranks import RanksConfig
from recipes.load import Section


class FinetuneConfig(Section):
    """One section a part; a section's name is its module's name."""

    ckpt: str = "none"  # what the training starts from; --ckpt sets it
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["no", "bf16"] = "bf16"  # of the backbone; distances and losses are float32
    log_every: int = Field(10, ge=1)  # steps
    method: dict[str, Any] = Field({"name": "bot"})  # `name`: a file in finetune/methods; then its own keys
    benchmark: BenchmarkConfig
    identities: IdentitiesConfig = IdentitiesConfig()
    sampling: SamplingConfig = SamplingConfig()
    augment: AugmentConfig = AugmentConfig()
    backbone: BackboneConfig = BackboneConfig()
    optim: OptimConfig = OptimConfig()
    validation: ValidationConfig = ValidationConfig()
    resume: ResumeConfig = ResumeConfig()
    ranks: RanksConfig = RanksConfig()
    rerank: RerankConfig = RerankConfig()
