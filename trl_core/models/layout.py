"""How rows of tokens are laid out for a forward pass, so that as few tokens as possible go through the model.

Three ways, equal in what they compute for the loss tokens:
    padded   a line per row, padded on the right; any model can do it
    packed   several rows one after the other in a line; positions restart, and no row attends to another
    shared   as packed, but rows of a group that start with the same prompt hold it once, followed by a branch for each
             completion; a branch attends to its prompt and itself

`packed` and `shared` need a model whose attention does as the mask says. `Layouts` tries that on a few tokens instead
of trusting the model's name, and falls back to `padded`.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import TokenRows
from .head import after_head
from .loading import dropouts, evaluating

logger = logging.getLogger(__name__)
PADDED, PACKED, SHARED = "padded", "packed", "shared"
Places = tuple[Tensor, Tensor]
"""Coordinates (line, position), two tensors of equal shape."""


@dataclass(frozen=True)
class Layout:
    """The arguments of a forward pass, and where to read its results."""

    inputs: dict[str, Tensor]
    """`input_ids` (lines, L), and what else tells the model who attends to whom."""
    predicting: Places
    """Where the logits of each of the T loss tokens are: one place before the token."""
    last: Places
    """Where the last token of each of the N rows is."""


@dataclass
class _Unit:
    """What stands together in a line: a prompt and the completions that follow it."""

    rows: list[int]
    prompt: Tensor
    completions: list[Tensor]

    def __len__(self) -> int:
        return self.prompt.numel() + sum(c.numel() for c in self.completions)


def lay_out(
    rows: TokenRows,
    kind: str,
    *,
    pad_token_id: int,
    one_line: bool = False,
    multiple: int | None = None,
    float_mask: torch.dtype | None = None,
    hidden_size: int = 1024,
) -> Layout:
    """Arrange rows.

    Args:
        rows: N rows on the model's device.
        kind: "padded", "packed" or "shared".
        pad_token_id: any valid id; padding is masked by length, for the pad token may be the terminator.
        one_line: put everything in one line, without padding; not for "padded".
        multiple: round the length of the lines up.
        float_mask: write the mask of "shared" as numbers of this type to add to attention scores, not as booleans.
        hidden_size: of the model, to weigh the cost of long lines against that of padding.
    """
    units = _units(rows, shared=kind == SHARED)
    sizes = [len(unit) for unit in units]
    if kind == PADDED:
        lines = [[i] for i in range(len(units))]
    else:
        lines = [list(range(len(units)))] if one_line else cheapest_lines(sizes, hidden_size)
    width = max((sum(sizes[i] for i in line) for line in lines), default=0)
    if multiple:
        width = -(-width // multiple) * multiple
    device = rows.prompt_ids.device
    ids = torch.full((len(lines), width), pad_token_id, device=device)
    positions = torch.zeros_like(ids)
    unit_of = torch.full_like(ids, -1)
    branch_of = torch.zeros_like(ids)
    line_of_row = torch.zeros(rows.num_rows, dtype=torch.long)
    start_of_row, last_of_prompt = torch.zeros_like(line_of_row), torch.zeros_like(line_of_row)
    for line, members in enumerate(lines):
        at = 0
        for i in members:
            unit, prompt = units[i], units[i].prompt.numel()
            ids[line, at : at + len(unit)] = torch.cat([unit.prompt, *unit.completions])
            unit_of[line, at : at + len(unit)] = i
            positions[line, at : at + prompt] = torch.arange(prompt, device=device)
            end_of_prompt = at + prompt - 1
            at += prompt
            for branch, (row, completion) in enumerate(zip(unit.rows, unit.completions, strict=True), start=1):
                size = completion.numel()
                positions[line, at : at + size] = torch.arange(prompt, prompt + size, device=device)
                branch_of[line, at : at + size] = branch
                line_of_row[row], start_of_row[row], last_of_prompt[row] = line, at, end_of_prompt
                at += size
        # Padding counts on as a document of its own.
        positions[line, at:] = torch.arange(width - at, device=device)
    inputs = {"input_ids": ids}
    if kind == PADDED:
        inputs["attention_mask"] = (unit_of >= 0).long()
    else:
        inputs["position_ids"] = positions
    if kind == SHARED:
        inputs["attention_mask"] = _tree_mask(unit_of, branch_of, float_mask)
    return Layout(inputs, *_places(rows, line_of_row, start_of_row, last_of_prompt))


def cheapest_lines(sizes: Sequence[int], hidden_size: int) -> list[list[int]]:
    """Which units (by index) stand in which line, so that the forward pass costs least.

    A line costs its width, padding included, times 1 for what every token costs and `width / (6 hidden_size)` for
    attention: a layer has about 12 h^2 weights, and each of its tokens meets `width` keys and values of h numbers.
    """
    best: list[list[int]] = []
    least = float("inf")
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    for count in range(1, len(sizes) + 1):
        lines: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, line) for line in range(count)]  # longest first into the emptiest line
        for i in order:
            used, line = heapq.heappop(filled)
            lines[line].append(i)
            heapq.heappush(filled, (used + sizes[i], line))
        width = max(used for used, _ in filled)
        cost = count * width * (1 + width / (6 * hidden_size))
        if cost < least:
            best, least = lines, cost
    return best


def _units(rows: TokenRows, *, shared: bool) -> list[_Unit]:
    prompts = rows.prompt_ids.split(rows.prompt_lengths.tolist())
    completions = rows.completion_ids.split(rows.completion_lengths.tolist())
    groups = rows.group.tolist()
    units: list[_Unit] = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if shared and row and groups[row] == groups[row - 1] and torch.equal(prompt, prompts[row - 1]):
            units[-1].rows.append(row)
            units[-1].completions.append(completion)
        else:
            units.append(_Unit([row], prompt, [completion]))
    return units


def _tree_mask(unit_of: Tensor, branch_of: Tensor, float_mask: torch.dtype | None) -> Tensor:
    """(lines, 1, L, L): True where the query (third axis) may attend to the key (fourth axis)."""
    length = unit_of.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=unit_of.device).tril()
    same_unit = unit_of[:, :, None] == unit_of[:, None, :]
    visible = (branch_of[:, None, :] == 0) | (branch_of[:, :, None] == branch_of[:, None, :])
    mask = (same_unit & visible & causal)[:, None]
    if float_mask is None:
        return mask
    return torch.zeros(mask.shape, dtype=float_mask, device=mask.device).masked_fill(~mask, torch.finfo(float_mask).min)


def _places(rows: TokenRows, line: Tensor, start: Tensor, last_of_prompt: Tensor) -> tuple[Places, Places]:
    device = rows.prompt_ids.device
    line, start, last_of_prompt = line.to(device), start.to(device), last_of_prompt.to(device)
    row = rows.row_of_completion_token
    within = torch.arange(row.numel(), device=device)
    within = within - (torch.cumsum(rows.completion_lengths, 0) - rows.completion_lengths)[row]
    before = torch.where(within == 0, last_of_prompt[row], start[row] + within - 1)
    predicting = (line[row][rows.loss_mask], before[rows.loss_mask])
    empty = rows.completion_lengths == 0
    last = torch.where(empty, last_of_prompt, start + rows.completion_lengths - 1)
    return predicting, (line, last)


class Layouts:
    """Which layouts a model computes exactly, found out by trying when first asked.

    Args:
        model: causal language model or sequence classifier, possibly wrapped for distributed training.
        share_prompts: whether "shared" may be used at all.
        one_line, multiple: see `lay_out`.
    """

    def __init__(
        self, model: nn.Module, *, share_prompts: bool = True, one_line: bool = False, multiple: int | None = None
    ) -> None:
        self._model = weakref.ref(model)
        self.share_prompts, self.one_line, self.multiple = share_prompts, one_line, multiple
        self._exact: set[str] | None = None

    @property
    def model(self) -> nn.Module:
        """The model, which is not kept alive."""
        model = self._model()
        assert model is not None
        return model

    def __call__(self, rows: TokenRows, pad_token_id: int) -> Layout:
        """The cheapest exact layout of these rows."""
        return lay_out(
            rows,
            self.choose(rows),
            pad_token_id=pad_token_id,
            one_line=self.one_line,
            multiple=self.multiple,
            float_mask=self._float_mask(),
            hidden_size=int(getattr(self._config, "hidden_size", None) or 1024),
        )

    def choose(self, rows: TokenRows) -> str:
        """The kind of layout for these rows."""
        if self._exact is None:
            self._exact = self._try()
            after_head(self.model, head_of(self.model))  # now, with the other trials
        window = attention_window(self._config)
        longest = int((rows.prompt_lengths + rows.completion_lengths).max()) if rows.num_rows else 0
        repeated = rows.num_rows > 1 and bool((rows.group[1:] == rows.group[:-1]).any())
        # A mask of our own replaces the model's, which in windowed layers would cut off what is further away.
        within = window is None or longest <= window
        # Completions that share a prompt would share its noise as well.
        noisy = self.model.training and self.drops
        # "shared" also packs: some models follow a mask that is given but make none from positions.
        wanted = repeated or (PACKED not in self._exact and rows.num_rows > 1)
        if SHARED in self._exact and wanted and within and not (noisy and repeated):
            return SHARED
        return PACKED if PACKED in self._exact and rows.num_rows > 1 else PADDED

    @functools.cached_property
    def drops(self) -> bool:
        """Whether the model makes noise while it is trained."""
        return any(value > 0 for *_, value in dropouts(self.model))

    @property
    def _config(self) -> Any:
        config: Any = getattr(unwrapped(self.model, "config"), "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def _attention(self) -> str:
        return str(getattr(self._config, "_attn_implementation", None) or "eager")

    def _float_mask(self) -> torch.dtype | None:
        return next(self.model.parameters()).dtype if self._attention == "eager" else None

    def _try(self) -> set[str]:
        """Compare the layouts with padded rows on two groups of a few tokens."""
        shareable = self.share_prompts and self._attention in ("sdpa", "eager")
        return self._exact_among([PACKED, SHARED] if shareable else [PACKED])

    def _exact_among(self, kinds: list[str]) -> set[str]:
        vocabulary = int(getattr(self._config, "vocab_size", 0) or 0)
        if vocabulary < 2 or head_of(self.model) is None:
            return set()
        device = next(self.model.parameters()).device
        rows, changed = (_probe_rows(vocabulary, start).to(device) for start in (14, 15))
        with evaluating(self.model):
            expected = self._outputs(rows, PADDED)
            # Rounding is allowed for, but not in what the others get from row 0: it may be small now and grow.
            others = rows.row_of_token > 0
            found = {kind: (self._outputs(rows, kind), self._outputs(changed, kind)) for kind in kinds}
            return {
                kind
                for kind, (before, after) in found.items()
                if _close(before, expected) and _close(after, before, others, 1e-6)
            }

    def _outputs(self, rows: TokenRows, kind: str) -> Tensor | None:
        # All in one line, so that rows really stand beside each other.
        layout = lay_out(rows, kind, pad_token_id=0, one_line=True, float_mask=self._float_mask())
        try:
            with token_outputs(self.model) as outputs:
                self.model(**layout.inputs, use_cache=False)
            return outputs.pop()[layout.predicting]
        except Exception as error:  # whatever a model does that was not made for such inputs
            logger.info("The layout %r is not for this model: %s", kind, error)
            return None


_layouts: weakref.WeakKeyDictionary[nn.Module, Layouts] = weakref.WeakKeyDictionary()


def layouts_of(model: nn.Module, layouts: Layouts | None = None) -> Layouts:
    """The layouts of a model that is called outside of a trainer's own steps; `layouts` sets them."""
    if layouts is not None or model not in _layouts:
        _layouts[model] = layouts or Layouts(model)
    return _layouts[model]


@contextlib.contextmanager
def token_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """While active, collects what the head of a model gives for every position, before any pooling.

    The head is a language model's output embeddings, or a sequence classifier's `score`.
    """
    found: list[Tensor] = []
    head = head_of(model)
    handle = head.register_forward_hook(lambda module, args, output: found.append(output)) if head else None
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()


def unwrapped(model: Any, attribute: str) -> Any:
    """What is inside the wrappers of a model that hide the attribute."""
    while not hasattr(model, attribute) and hasattr(model, "module"):
        model = model.module
    return model


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits or scores, or None if it is not known."""
    inner = unwrapped(model, "get_output_embeddings")
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    head = getattr(inner, "score", None) if head is None else head
    return head if isinstance(head, nn.Module) else None


def attention_window(config: Any) -> int | None:
    """The fewest tokens any layer looks back, or None where all look back without limit."""
    names = ("sliding_window", "attention_chunk_size")
    sizes = [getattr(config, name, None) for name in names]
    limits = [size for size in sizes if isinstance(size, int) and size > 0]
    return min(limits, default=None)


def _probe_rows(vocabulary: int, first_completion: int) -> TokenRows:
    """Two groups of two rows; `first_completion` chooses the tokens of row 0's completion."""
    ids = [3 + (7 * i) % max(vocabulary - 3, 1) if vocabulary > 3 else i % vocabulary for i in range(40)]
    first, second = ids[:9], ids[9:14]
    completions = [ids[first_completion:][:5], ids[19:26], ids[26:30], ids[30:33]]
    return TokenRows.from_lists([first, first, second, second], completions, group=[0, 0, 1, 1])


def _close(
    found: Tensor | None, expected: Tensor | None, rows: Tensor | None = None, tolerance: float | None = None
) -> bool:
    if found is None or expected is None:
        return False
    if tolerance is None:
        tolerance = 1e-3 if expected.dtype == torch.float32 else 3e-2
    found, expected = (value.float() if rows is None else value.float()[rows] for value in (found, expected))
    return bool(torch.isfinite(found).all()) and bool(
        (found - expected).abs().max() <= tolerance * expected.abs().max()
    )
