"""The data of feature pages as frozen values: one `FeaturePage` per latent and one `Overview` of them all.

Written by `collect`, read by the browser and by the exports. All numbers are plain Python ones, all texts are as the
tokenizer gave them: whoever writes them into a page escapes them.
Every score stands beside its null: the same question with the examples shuffled among latents of equal frequency, so
that another latent that fires about as often stands in this one's place.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is known of a latent before any example."""

    density: float
    """Share of the counted tokens at which it fires."""
    n_firings: int
    max_activation: float
    dead: bool
    """It fired at none of the counted tokens; how many these were is in the overview."""
    decoder_norm: float
    encoder_norm: float | None
    """None where the dictionary has no linear encoder."""
    cosine: float | None
    """Between encoder and decoder direction, where both live in one space."""
    bias: float | None


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts between edges; one more edge than counts."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """A token of the vocabulary with a number."""

    id: int
    text: str
    value: float


@dataclass(frozen=True, kw_only=True)
class LogitLens:
    """What one unit of the latent adds to the logits if nothing after it acted, up to the final norm's scale."""

    top: tuple[TokenScore, ...]
    bottom: tuple[TokenScore, ...]
    histogram: Histogram
    skew: float
    kurtosis: float
    """Excess kurtosis: 0 for a normal distribution."""
    hit: float | None
    """Share of firings whose next token is among `top`."""
    hit_null: float | None
    """The same firings with the list of an equally frequent other latent."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A latent or neuron that is close, with how close."""

    name: str
    """`1203` for a latent, `L3 N712` for a neuron of layer 3, `dim 17` for a coordinate."""
    value: float
    null: float | None = None
    """The same number with the stand-in in this latent's place."""
    latent: int | None = None
    """The latent, where it is one."""
    together: float | None = None
    """Cosine of the two latents' activations over the counted tokens, where that was looked at."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Who is close, by which measure; empty where the measure does not apply."""

    similar: tuple[Neighbour, ...]
    """Largest cosine of decoder rows."""
    correlated: tuple[Neighbour, ...]
    """Largest Pearson correlation over the counted tokens."""
    neurons: tuple[Neighbour, ...]
    """Largest |cosine| of the decoder row with what an MLP neuron writes."""
    coordinates: tuple[tuple[int, float, float], ...]
    """Largest coordinates of the decoder row: index, value, share of its L1 norm."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A token at which the latent fires, in its context."""

    group: int
    """-1 for the largest activations, i for interval i of (0, max]."""
    row: int
    pos: int
    start: int
    """Position of the first token shown."""
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    """The latent at each token shown; 0 also where a token was not counted."""
    first: bool
    """Nothing that is counted comes before it in its row."""
    loss: tuple[float | None, ...] | None = None
    """Rise of each token's next-token loss, in nats, when the latent is zeroed in this row."""
    loss_null: float | None = None
    """The same at the example's token, with the direction of an equally frequent latent removed at equal norm."""

    @property
    def at(self) -> int:
        """Place of the example's token among the tokens shown."""
        return self.pos - self.start

    @property
    def activation(self) -> float:
        return self.values[self.at]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Numbers about the latent's meaning, each with its null; None where it could not be had."""

    token_share: float | None
    """Share of firings on the token id that it fires most on: high for a latent that stands for one token. The id is
    picked on the same firings, so the share of a latent that fires rarely comes out a little high."""
    token_share_null: float | None
    """Share of an equally frequent latent's firings on that token id."""
    ablation: float | None
    """Mean rise of the next-token loss at the ablated examples' tokens, in nats."""
    ablation_null: float | None
    n_ablated: int = 0


@dataclass(frozen=True, kw_only=True)
class FeaturePage:
    """Everything about one latent."""

    latent: int
    header: Header
    histogram: Histogram | None
    """Of firing values, over (0, max]; None where it never fires."""
    lens: LogitLens | None
    neighbours: Neighbours
    examples: tuple[Example, ...]
    scores: Scores
    common: TokenScore | None
    """The token it fires most on, with the share of firings."""
    null_latent: int | None
    """The equally frequent latent that stands in for it in every null."""
    vector: tuple[float, ...] | None = None
    """Its decoder row, where an export asked for it."""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What all pages share, and what a reader should doubt."""

    model: str
    site: str
    dictionary: str
    corpus: str
    d_dict: int
    n_rows: int
    n_tokens: int
    """Real tokens read."""
    n_counted: int
    """Tokens that count: the others are first tokens of rows and massive activations."""
    n_dead: int
    n_rare: int
    """Latents that fire, but less often than `min_firings`."""
    n_live: int
    n_shown: int
    min_firings: int
    n_intervals: int
    """Equal intervals of (0, max] that examples are grouped by."""
    seed: int
    chosen: str
    """How the latents shown were picked: `random`, `all`, or `named`."""
    layer: int | None
    lens_warning: str | None
    """Why the logit lens is weak or missing here."""
    density: Histogram
    """log10 of the density of all latents that fire."""
    chance_similar: float
    """Largest cosine of a random direction with as many random ones as there are other latents (median)."""
    chance_neurons: float | None
    """Largest |cosine| of a random direction with as many as there are neurons before the site (median)."""
    notes: tuple[str, ...] = ()
