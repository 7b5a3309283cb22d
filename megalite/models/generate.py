"""Sampling from a GPT in one process."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megalite.models.batch import Microbatch
from megalite.models.gpt import GPT


def choose(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> Tensor:
    """Draw the next token of each row: logits [b, v] -> ids [b].

    Args:
        logits: [b, v].
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw from this many most likely tokens; 0: from all.
        top_p: of those, draw from the fewest whose probabilities add up to this share (nucleus
            sampling, Holtzman et al. 2019).
        generator: on the device of the logits.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.double() / temperature).softmax(dim=-1)
    # Most likely first: both limits then cut off a tail.
    probabilities, order = probabilities.sort(dim=-1, descending=True)
    if top_k > 0:
        probabilities[..., top_k:] = 0
    # Nucleus: what precedes a token must not hold the share already; the first always stays.
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities[before >= top_p * probabilities.sum(dim=-1, keepdim=True)] = 0
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1234,
) -> Iterator[Tensor]:
    """Yield the tokens that continue a prompt: ids [b], one step at a time.

    Args:
        model: a GPT on one rank. It is put in evaluation mode.
        prompt: ids [b, s].
        max_new_tokens: steps.
        temperature, top_k, top_p: see `choose`.
        seed: seed of the draws.

    Nothing is cached: each step is a forward pass over the last `positions` tokens. Raises
    ValueError at the first step if the model is on several ranks, the prompt is empty, or a setting
    is out of range.
    """
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(
            f"temperature {temperature:g}, top_k {top_k}, top_p {top_p:g}: temperature and top_k "
            "must be at least 0 (0 = the most likely token; no limit), top_p above 0 and at most 1"
        )
    if model.context.world_size != 1:
        raise ValueError(
            "sampling runs in one process; this model is spread over "
            f"{model.context.world_size} ranks"
        )
    if prompt.shape[1] == 0:
        raise ValueError(
            "the prompt has no tokens: give at least one to start from, such as end of document"
        )
    model.eval()
    generator = torch.Generator(prompt.device).manual_seed(seed)
    text = prompt
    for _ in range(max_new_tokens):
        logits = model(None, Microbatch(text[:, -model.model_config.positions :]))
        # [s, b, v_padded] -> [b, v].
        last = logits[-1, :, : model.model_config.vocab_size]
        token = choose(last, temperature, top_k, top_p=top_p, generator=generator)
        yield token
        text = torch.cat([text, token.unsqueeze(1)], dim=1)
