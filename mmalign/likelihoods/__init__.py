"""The tensors of one step, and how likely a network finds the candidates in them: `.logps(network) -> (batch, k)`.

All randomness (noise, timestep) is already in the fields: policy and reference, chosen and rejected see the same draw, and a
step can be replayed. One `.logps` is one call of the network, the candidates folded into the batch.
"""

from mmalign.likelihoods.denoising import DenoisingInputs, winner_guard
from mmalign.likelihoods.layouts import Layout, Segment, Tokens
from mmalign.likelihoods.networks import Measures
from mmalign.likelihoods.scores import ScoreInputs, Texts, padded_texts
from mmalign.likelihoods.tokens import TokenInputs
from mmalign.likelihoods.transitions import TransitionInputs

__all__ = [
    "DenoisingInputs",
    "Layout",
    "Measures",
    "ScoreInputs",
    "Segment",
    "Texts",
    "TokenInputs",
    "Tokens",
    "TransitionInputs",
    "padded_texts",
    "winner_guard",
]
