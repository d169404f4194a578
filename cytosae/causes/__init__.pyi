from .ablate import ablate_latents as ablate_latents
from .ablate import read_ablation as read_ablation
from .config import AblateConfig as AblateConfig
from .report import AblateResult as AblateResult
