"""Laplace approximations over the LoRA weights of language models, for `laplace-torch`.

Importing this package registers ``subset_of_weights="lora"`` with `laplace.Laplace`.
"""

from laplace_llm.backends import StreamingEF, StreamingGGN
from laplace_llm.callback import LaplaceCallback
from laplace_llm.causal_heads import MultipleChoiceHead
from laplace_llm.collate import (
    LETTERS,
    ChoiceScoringCollator,
    MultipleChoiceCollator,
    letter_prompt,
    question_prompt,
)
from laplace_llm.errors import LaplaceLLMError
from laplace_llm.heads import SequenceClassificationHead
from laplace_llm.loading import from_pretrained
from laplace_llm.scoring_head import ChoiceScoringHead
from laplace_llm.shards import Shard
from laplace_llm.shared import shared_moments_grid
from laplace_llm.structures import (
    DiagLoraLaplace,
    EkfacLoraLaplace,
    ELLALoraLaplace,
    FullLoraLaplace,
    FunctionalLoraLaplace,
    KronLoraLaplace,
    Laplace,
    LowRankLoraLaplace,
    VaLLALoraLaplace,
)
from laplace_llm.subnet import LoraSubnetMask

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  # grouped by what they are for
    # posteriors
    "Laplace",
    "KronLoraLaplace",
    "EkfacLoraLaplace",
    "LowRankLoraLaplace",
    "DiagLoraLaplace",
    "FullLoraLaplace",
    "FunctionalLoraLaplace",
    "ELLALoraLaplace",
    "VaLLALoraLaplace",
    "shared_moments_grid",
    "from_pretrained",
    # curvature backends
    "StreamingGGN",
    "StreamingEF",
    # heads and their collators
    "MultipleChoiceHead",
    "ChoiceScoringHead",
    "SequenceClassificationHead",
    "MultipleChoiceCollator",
    "ChoiceScoringCollator",
    "LETTERS",
    "letter_prompt",
    "question_prompt",
    # data that several processes share
    "Shard",
    # the Trainer
    "LaplaceCallback",
    # the parent's subnetwork Laplace
    "LoraSubnetMask",
    # errors
    "LaplaceLLMError",
]
