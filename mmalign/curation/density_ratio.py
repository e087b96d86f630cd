"""CDR: the log-density ratio of a strong over a weak model as a reward that needs no training."""

from collections.abc import Callable, Collection, Sequence

from jaxtyping import Float
from torch import Tensor

# (prompts, responses) -> summed log-probability of each response given its prompt, nats
LogProbs = Callable[[Sequence[str], Sequence[str]], Float[Tensor, " n"]]


def density_ratio(
    strong: Float[Tensor, " n"], weak: Float[Tensor, " n"], lengths: Float[Tensor, " n"] | None = None
) -> Float[Tensor, " n"]:
    """Reward of each response.

    r = log p_strong(y | x) - log p_weak(y | x),  divided by the number of tokens where lengths are given

    Source: CDR / DrSow (arXiv 2411.02481). Strong: an aligned model; weak: its base or SFT checkpoint.

    Args:
        strong, weak: summed log-probs of the response, each under the model's own tokeniser, nats.
        lengths: tokens of the response under the strong model's tokeniser; None: the sum.
    """
    ratio = strong - weak
    return ratio if lengths is None else ratio / lengths


def response_sum(
    logps: Sequence[float],
    tokens: Sequence[str],
    num_prompt_tokens: int,
    *,
    special: Collection[str] = (),
    shifted: bool = False,
) -> tuple[float, int]:
    """Sum of a response's token log-probs, and how many tokens it has.

    Source: DrSow, whose slice begins at num_prompt_tokens - 1: right where entry t is of token t + 1, else one token too many.

    Args:
        logps: log-prob of every token of prompt and response, nats.
        tokens: the tokens themselves.
        num_prompt_tokens: tokens of the prompt.
        special: tokens that are left out of the sum (padding, end of turn).
        shifted: begin one token earlier, as the published slice does.
    """
    start = num_prompt_tokens - shifted
    kept = [logp for logp, token in zip(logps[start:], tokens[start:], strict=True) if token not in special]
    return sum(kept), len(kept)


def annotated(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    strong: LogProbs,
    weak: LogProbs,
    customise: Callable[[str], str] | None = None,
) -> Float[Tensor, " n"]:
    """Density-ratio rewards of responses by two models.

    Source: as `density_ratio`; customised: a criterion and exemplars stand before the prompt of the strong model.

    Args:
        prompts, responses: entry i of both belongs together.
        strong, weak: models, as (prompts, responses) -> summed log-probs, nats.
        customise: what the strong model is asked instead of each prompt. None: the prompt.
    """
    asked = prompts if customise is None else [customise(prompt) for prompt in prompts]
    return density_ratio(strong(asked, responses), weak(prompts, responses))
