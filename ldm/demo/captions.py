"""Training a text encoder on captions alone, before it conditions a diffusion model.

Trained along with the denoiser from the start, a text encoder keeps what lowers the loss at once
and loses the rest: words for left and right became the same to it. Here it learns to tell the
attributes of a scene first, which takes minutes. Stable Diffusion's encoders bring the like from
their own training on pictures and captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint.files import open_state_dict
from ldm.util import instantiate_from_config


class CaptionReader(nn.Module):
    """A text encoder with a linear head for each attribute, on the mean of its embeddings.

    The mean is what attention sees that does not know yet where to look. A batch has captions
    under ``caption`` and names of values under ``scene``.

    Args:
        cond_stage_config: ``target``/``params`` of the encoder.
        attributes: values of each attribute.
        ckpt_path: weights to start from, as in LatentDiffusion.
        keep: weight of the distance to the embeddings that these weights gave, so that a denoiser
            trained with them still understands.
    """

    def __init__(
        self,
        cond_stage_config: Mapping[str, Any],
        attributes: Mapping[str, Sequence[str]],
        ckpt_path: str | None = None,
        keep: float = 0.0,
    ) -> None:
        super().__init__()
        self.keep = keep
        self.attributes = {name: list(values) for name, values in attributes.items()}
        # state-dict name
        self.cond_stage_model = instantiate_from_config(cond_stage_config, nn.Module)
        self.before = None
        if ckpt_path is not None:
            self._load(ckpt_path)
        if keep:
            self.before = instantiate_from_config(cond_stage_config, nn.Module)
            self.before.load_state_dict(self.cond_stage_model.state_dict())
            self.before.requires_grad_(False)
        width = cond_stage_config["params"]["text_config"]["hidden_size"]
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, len(values)) for name, values in self.attributes.items()}
        )

    def _load(self, path: str) -> None:
        prefix, weights = "cond_stage_model.", open_state_dict(path)
        names = [name for name in weights if name.startswith(prefix)]
        state = {name.removeprefix(prefix): weights[name] for name in names}
        self.cond_stage_model.load_state_dict(state)

    def terms(self, batch: dict[str, Any], split: str) -> dict[str, Tensor]:
        """Returns the sum of the attributes' cross entropies and what ``keep`` adds as ``loss``,
        and the attributes' accuracies."""
        embedding = self.cond_stage_model(batch["caption"])
        terms = {"loss": torch.zeros((), device=embedding.device)}
        if self.before is not None:
            terms["moved"] = F.mse_loss(embedding, self.before(batch["caption"]))
            terms["loss"] = self.keep * terms["moved"]
        for name, head in self.heads.items():
            labels = [self.attributes[name].index(value) for value in batch["scene"][name]]
            target = torch.tensor(labels, device=embedding.device)
            scores = head(embedding.mean(1))
            terms["loss"] = terms["loss"] + F.cross_entropy(scores, target)
            terms[name] = (scores.argmax(1) == target).float().mean()
        return terms

    def optimizer(self, learning_rate: float, n_steps: int) -> torch.optim.Optimizer:
        """AdamW; the decay of the heads' weights makes the encoder speak up."""
        return torch.optim.AdamW(
            [
                {"params": self.cond_stage_model.parameters(), "weight_decay": 0.0},
                {"params": self.heads.parameters(), "weight_decay": 0.3},
            ],
            lr=learning_rate,
        )
