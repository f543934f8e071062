"""Router -> engine: what to run."""

from cluster.protocol.base import Wire
from cluster.protocol.pulls import PullSource


class SamplingParams(Wire, kw_only=True):
    """How to choose tokens. All defaults mean "off" but for temperature, which is 1 as in OpenAI's interface.

    The order of application: repetition, presence and frequency penalties and logit_bias on the fp32 logits, then the ban of
    stop_token_ids as long as min_tokens asks for it, then temperature, then top_k, top_p and min_p as filters, then arg-max of what
    is left plus Gumbel noise. temperature 0 is greedy: the arg-max after penalties, bias and ban, without filters or noise.
    """

    seed: int = 0
    """Unsigned 64 bit. Drawn by the router where the user gave none, so that a later attempt draws the same noise."""
    max_tokens: int = 16
    """At most so many generated tokens per choice, those of earlier attempts included."""
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output (Keskar et al. 2019, CTRL): positive logits divided by it, negative ones multiplied."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    """None: no log-probabilities. k >= 0: that of the chosen token and of the k most likely ones."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a choice (end-of-sequence ids included by the router, unless ignore_eos). They are emitted as its last."""
    prompt_logprobs: int | None = None
    """As logprobs, of the prompt's own tokens, the first excepted: nothing comes before it. max_tokens may then be 0."""
    min_tokens: int = 0
    """Until so many tokens of a choice were generated, its stop tokens can't be drawn, nor does a stop string end it."""
    beam_width: int = 0
    """0: draw tokens. Else beam search with so many live beams, of which the n best outputs are the choices, best first. It goes by
    the model's own log-probabilities: temperature and seed change nothing, penalties, bias and filters don't go with it."""
    length_penalty: float = 1.0
    """Of beam search: outputs are ranked by their log-probability over length ** length_penalty."""
    early_stopping: bool = False
    """Of beam search: end as soon as there are beam_width outputs, even if a live beam might still be better than one of them."""


class Request(Wire, kw_only=True):
    """One attempt at a request."""

    id: str
    attempt: int
    reply_to: str
    """Address of the router's mailbox: where deltas go."""
    prompt: list[int]
    emitted: list[list[int]]
    """Per choice the tokens already delivered by earlier attempts: not prompt, but not computed again as output either."""
    finished: list[bool]
    """Per choice: it had already ended in an earlier attempt (or by a stop string) and isn't run again."""
    params: SamplingParams
    deadline_s: float | None = None
    """Seconds from receipt after which nobody waits for the answer."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    scored: int = 1
    """With params.prompt_logprobs: those of the prompt positions before this one were delivered by earlier attempts."""


class Submit(Wire, tag=True):
    """Router -> engine: run this. The engine must have been named in a Placement of the same attempt."""

    epoch: int
    request: Request
    source: PullSource | None = None
    """The Placement's."""


class Cancel(Wire, tag=True, kw_only=True):
    """Router -> engine: nobody waits for these choices any more (client gone, stop string found, deadline passed)."""

    request: str
    attempt: int
    choices: list[int]
