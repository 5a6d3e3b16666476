"""The recipe of a pretraining: composes the configs of the parts, defines nothing of its own but the run's settings."""

from typing import Literal

from pydantic import Field

from pretrain.backbone import BackboneConfig
from pretrain.centering import CenteringConfig
from pretrain.checkpoint import CheckpointConfig
from pretrain.heads import HeadsConfig
from pretrain.health import HealthConfig
from pretrain.loader import LoaderConfig
from pretrain.losses import LossesConfig
from pretrain.masks import MasksConfig
from pretrain.optim import OptimConfig
from pretrain.photometric import PhotometricConfig
from pretrain.planning import PlanningConfig
from pretrain.ranks import RanksConfig
from pretrain.schedules import SchedulesConfig
from pretrain.showing import PicturesConfig
from pretrain.verdict import VerdictConfig
from pretrain.views import ViewsConfig
from recipes.load import Section
from shards.cache import CacheConfig
from shards.order import OrderConfig


class PretrainConfig(Section):
    """One section a part; a section's name is its module's name."""

    ckpt: str = "none"  # what the training starts from; --ckpt sets it
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["no", "bf16"] = "bf16"  # of the backbones; heads and losses are float32 (fp16 gives NaN)
    log_every: int = Field(10, ge=1)  # steps; the first 50 also every 10th, and the last
    dry_run: bool = False  # plan, print, stop
    loader: LoaderConfig
    order: OrderConfig = OrderConfig()
    cache: CacheConfig = CacheConfig()
    views: ViewsConfig = ViewsConfig()
    photometric: PhotometricConfig = PhotometricConfig()
    masks: MasksConfig = MasksConfig()
    backbone: BackboneConfig = BackboneConfig()
    heads: HeadsConfig = HeadsConfig()
    centering: CenteringConfig = CenteringConfig()
    losses: LossesConfig = LossesConfig()
    schedules: SchedulesConfig = SchedulesConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    ranks: RanksConfig = RanksConfig()
    pictures: PicturesConfig = PicturesConfig()
    planning: PlanningConfig = PlanningConfig()
    verdict: VerdictConfig = VerdictConfig()
