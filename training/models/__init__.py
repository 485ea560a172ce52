# SPDX-License-Identifier: Apache-2.0
"""Model and objective of a recipe -> a task. Imported lazily: a recipe needs only its own family."""

from dataengine.networks.config import (
    InternVideo2ClipConfig,
    InternVideo2Stage2Config,
    ViCLIPConfig,
)
from training.config import (
    ContrastiveObjective,
    DistilConfig,
    DistilObjective,
    OpenClipConfig,
    Stage2Objective,
    TrainConfig,
)
from training.models.task import Task


def build_task(config: TrainConfig) -> Task:
    """Returns a freshly initialised task; torch's default generator draws its weights.

    Teachers are loaded with it; what ``config.init`` names is not.
    """
    model, objective = config.model, config.objective
    match model, objective:
        case ViCLIPConfig(), ContrastiveObjective():
            from dataengine.networks.viclip import ViCLIP
            from training.models.contrastive import ContrastiveTask

            return ContrastiveTask(ViCLIP(model), objective)
        case OpenClipConfig(), ContrastiveObjective():
            from training.models.contrastive import ContrastiveTask
            from training.models.open_clip_model import OpenClipDualEncoder

            return ContrastiveTask(OpenClipDualEncoder(model), objective)
        case InternVideo2ClipConfig(), ContrastiveObjective():
            from dataengine.networks.internvideo2_clip import InternVideo2Clip
            from training.models.contrastive import ContrastiveTask

            return ContrastiveTask(InternVideo2Clip(model), objective)
        case InternVideo2Stage2Config(), Stage2Objective():
            from training.models.stage2 import Stage2Task

            return Stage2Task(model, objective)
        case DistilConfig(), DistilObjective():
            from training.models.distil import DistilTask

            return DistilTask(model, objective)
        case _:
            raise AssertionError("the recipe checks that model and objective fit")
