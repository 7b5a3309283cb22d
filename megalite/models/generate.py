"""Sampling text from a GPT held by one process."""

from collections.abc import Iterator

import torch

from megalite.models.batch import Microbatch
from megalite.models.gpt import GPT


def choose(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> torch.Tensor:
    """Draw the next token of each row from logits [b, v]: token ids [b].

    temperature 0 takes the most likely one. Otherwise logits are divided by it, and only the `top_k` most likely tokens
    (0 = all), of those the fewest that hold a share `top_p` of the probability (Holtzman et al. 2019), are drawn from.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, order = (
        (logits.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    )
    if top_k > 0:
        probabilities[..., top_k:] = 0
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities[before >= top_p * probabilities.sum(dim=-1, keepdim=True)] = 0
    place = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, place).squeeze(-1)


@torch.no_grad()
def generate(
    model: GPT,
    prompt: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1234,
) -> Iterator[torch.Tensor]:
    """Yield the next token [b] after prompt [b, s], again and again, each from all that came before it.

    Every token costs a forward pass over the text so far, or over its last `positions` tokens: nothing is cached. Puts
    the model in evaluation mode. Raises ValueError, when the first token is asked for, if the model is spread over
    several ranks, the prompt is empty, or a setting makes no sense.
    """
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(
            f"temperature {temperature:g}, top_k {top_k}, top_p {top_p:g}: temperature and top_k must be at least 0 "
            "(0 = the most likely token; no limit), top_p above 0 and at most 1"
        )
    if model.context.world_size != 1:
        raise ValueError(
            f"sampling runs in one process; this model is spread over {model.context.world_size} ranks"
        )
    if prompt.shape[1] == 0:
        raise ValueError(
            "the prompt has no tokens: give at least one to start from, such as end of document"
        )
    model.eval()
    generator = torch.Generator(prompt.device).manual_seed(seed)
    text = prompt
    for _ in range(max_new_tokens):
        logits = model(None, Microbatch(text[:, -model.config.positions :]))[
            -1, :, : model.config.vocab_size
        ]
        token = choose(logits, temperature, top_k, top_p, generator)
        yield token
        text = torch.cat([text, token.unsqueeze(1)], dim=1)
