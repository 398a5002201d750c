"""Rank space: K members' chains of low-rank attention modules without a wide array of their own.

Written plainly, module j of one member computes

    x_j = S_j + sum_{i<j} Delta_i          S_j a constant of the data, wide (B, T, D)
    Delta_j = Attention(LN(x_j) A_q, LN(x_j) A_k, LN(x_j) A_v) Up + up_bias

Computed so, each member keeps two wide arrays a module. But Delta_i = A_i W_i, with A_i
(B, T, R) the attention output: a member's own part of the state never leaves rank space. With

    P_j = (A_q, A_k, A_v)^T * gain         (3R, D)  LN's gain folded into the projections
    W_i = (Up, up_bias)^T                  (R+1, D) and a 1 appended to A_i
    _c  = mean over D taken away

LN(x_j) needs no wide array of its own:

    LN(x_j) P_j^T = (S_c P_j^T + sum_i A_i C_ij) / sqrt(variance + eps)       C_ij = W_i,c P_j^T
    D variance    = |S_c|^2 + 2 sum_i (S_c W_i,c^T) . A_i + sum_i (sum_{l<=i} A_l H_li) . A_i

with H_li = 2 W_l,c W_i,c^T for l < i, and W_i,c W_i,c^T for l = i. So the only wide product is
S_c (P, W_1,c, …)^T, of a constant, which needs no gradient. This is an exact rewriting (a float64
test states it), not an approximation. Products may be in bfloat16; the variance, a sum that
cancels, is summed up in float32.

The backward pass is written out too. With g_j the gradient of D variance_j, d_j that of the
numerator above and e_i = sum_{j>i} g_j, what reaches A_i from the modules after it is

    sum_{j>i} (d_j C_ij^T + 2 g_j S_j,c W_i,c^T + 2 e_j A_j W_j,c W_i,c^T)
      + 2 e_i sum_{l<=i} A_l W_l,c W_i,c^T

and the gradients of C and H are A^T d and A^T (e A). Autograd would keep every narrow array; we
keep the product with S, in which queries, keys and values take the place of S_c P^T, and A.
Attention is computed again. The code holds all narrow arrays transposed, tokens last: rows of A,
a factor a token and sums over rows are then runs of memory, several times faster on a CPU.

The file is long for a reason: both passes are one piece of algebra, to be read beside this page.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.side.layers import LN_EPS, fused_attention, wide


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The shape of a chain, and which rows of its arrays are whose.

    Rows of A go by module, R + 1 each. So do those of `inner`: first C_·j, 3R, then H_·j, R + 1.
    The product with a state holds qkv of the modules that read it, then the overlaps W_i,c S_c^T
    with all modules i before the last of them. `prefix` is how many tokens the pool leaves out,
    None if it takes the first token alone.
    """

    state_of: tuple[int, ...]
    rank: int
    heads: int
    prefix: int | None

    ROWS: ClassVar[int] = 2**13  # images times tokens computed at a time

    @property
    def modules(self) -> int:
        return len(self.state_of)

    @property
    def modules_of(self) -> list[list[int]]:
        """Modules that read each state, in order."""
        runs = itertools.groupby(range(self.modules), self.state_of.__getitem__)
        return [list(run) for _, run in runs]

    def block(self, module: int) -> slice:
        """A module's rows of A; the last of them is the 1."""
        return slice(module * (self.rank + 1), (module + 1) * (self.rank + 1))

    def inner_blocks(self, module: int) -> tuple[slice, slice]:
        """A module's rows of `inner`: C_·j and H_·j."""
        start = module * (4 * self.rank + 1)
        middle = start + 3 * self.rank
        return slice(start, middle), slice(middle, middle + self.rank + 1)

    def asked(self, module: int, tokens: int) -> int:
        """How many tokens of a module's output anybody reads: they come first."""
        return 1 if self.prefix is None and module == self.modules - 1 else tokens

    def sharpness(self, like: Tensor) -> Tensor:
        """Factors (3R) of queries, keys and values."""
        scale = (self.rank // self.heads) ** -0.5
        ones = like.new_ones(3 * self.rank)  # a list would be a copy that waits for a GPU
        ones[: self.rank] = scale
        return ones

    def matrices(self, projections: Tensor, ups: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """What each state is multiplied with, (K, rows, D)."""
        projections, ups = projections.to(dtype), ups.flatten(1, 2).to(dtype)
        return [
            torch.cat(
                [
                    projections[:, run[0] : run[-1] + 1].flatten(1, 2),
                    ups[:, : self.block(run[-1]).start],
                ],
                dim=1,
            )
            for run in self.modules_of
        ]

    def inner(self, projections: Tensor, ups: Tensor, dtype: torch.dtype) -> Tensor:
        """C and H, transposed and interleaved: (K, M(4R+1), M(R+1)).

        Made from what `matrices` multiplies a state with, rounded as there.
        """
        ups = ups.to(dtype)
        both = torch.cat([projections.to(dtype), ups], dim=2)  # (K, M, 4R+1, D)
        inner = _mm(both.flatten(1, 2), ups.flatten(1, 2).mT)
        return (inner.unflatten(1, (self.modules, -1)) * self.shares(inner)).flatten(1, 2)

    def shares(self, like: Tensor) -> Tensor:
        """How often each product of matrices counts, (M, 4R+1, M(R+1)): see C and H above."""
        earlier = like.new_ones(self.modules, self.modules).tril(-1)
        own = 2 * earlier + torch.eye(self.modules, dtype=like.dtype, device=like.device)
        rows = [earlier[:, None]] * 3 * self.rank + [own[:, None]] * (self.rank + 1)
        return torch.cat(rows, dim=1).repeat_interleave(self.rank + 1, dim=2)

    def parts(self, data: Data, members: int) -> Iterator[tuple[slice, slice]]:
        """Slices of images, and of members within them, to be computed at a time.

        On a CPU one member: together they gain nothing there. Fewer rows at a time do not pay
        either, however well they fit a cache: the weights' side costs the same for any number.
        """
        batch, tokens, _ = data.states[0].shape
        at_once = 1 if data.states[0].is_cpu else members
        images = max(1, self.ROWS // tokens)
        for image in range(0, batch, images):
            for member in range(0, members, at_once):
                yield slice(image, image + images), slice(member, member + at_once)

    def pool(self, branches: Tensor, sums: torch.dtype) -> Tensor:
        """(k, n, b, T) → (k, b, n)."""
        if self.prefix is None:
            return branches[..., 0].mT.to(sums)
        return branches[..., self.prefix :].mean(dim=-1, dtype=sums).mT

    def spread(self, gradient: Tensor, tokens: int) -> Tensor:
        """The gradient of `pool`: (k, b, n) → (k, n, b, T)."""
        gradient = gradient.mT
        spread = gradient.new_zeros(*gradient.shape, tokens)
        if self.prefix is None:
            spread[..., 0] = gradient
        else:
            spread[..., self.prefix :] = (gradient / (tokens - self.prefix))[..., None]
        return spread


@dataclass(frozen=True, kw_only=True)
class Data:
    """The constants of a batch, or of a part of it with images and tokens in one, N = bT."""

    states: Sequence[Tensor]  # each (B, T, D), or (N, D)
    squares: Sequence[Tensor]  # each (B, T), or (N)
    keep: Tensor | None  # (K, M, B), or (k, M, N)
    learning: bool  # whether there will be a backward pass

    def part(self, images: slice, some: slice, sums: torch.dtype) -> Data:
        """What some members need of some images."""
        keep = self.keep
        if keep is not None:
            tokens = self.states[0].shape[1]
            keep = keep[some, :, images].repeat_interleave(tokens, dim=2).to(sums)
        return Data(
            states=[state[images].flatten(0, 1) for state in self.states],
            squares=[square[images].flatten() for square in self.squares],
            keep=keep,
            learning=self.learning,
        )


class Gradients(NamedTuple):
    """Of the matrices that `RankSpace` takes; parts add to them."""

    projections: Tensor
    ups: Tensor
    bias: Tensor
    inner: Tensor


class RankSpace(torch.autograd.Function):
    """(projections (K, M, 3R, D), ups (K, M, R+1, D), bias, inner) → pooled A, (K, B, M(R+1)).

    `ups` come centred: with them and the states, projections need not be.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        data: Data,
        projections: Tensor,
        ups: Tensor,
        bias: Tensor,
        inner: Tensor,
    ) -> Tensor:
        ctx.plan, ctx.data, ctx.shapes = plan, data, (projections.shape, ups.shape)
        batch, tokens, _ = data.states[0].shape
        matrices = plan.matrices(projections, ups, data.states[0].dtype)
        pooled = bias.new_empty(len(bias), batch, inner.shape[2])
        kept: list[Tensor] = []
        for images, some in plan.parts(data, len(bias)):
            part = Part(plan, data.part(images, some, bias.dtype), bias[some], inner[some], tokens)
            part.forward([matrix[some] for matrix in matrices])
            pooled[some, images] = plan.pool(part.tokens_of(part.branches), bias.dtype)
            if data.learning:
                kept += [*part.products, part.branches, part.variances]
        ctx.save_for_backward(bias, inner, *kept)
        return pooled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan, data, (bias, inner, *kept) = ctx.plan, ctx.data, ctx.saved_tensors
        tokens, taken = data.states[0].shape[1], iter(kept)
        to = Gradients(*(bias.new_zeros(shape) for shape in (*ctx.shapes, bias.shape, inner.shape)))
        for images, some in plan.parts(data, len(bias)):
            part = Part(plan, data.part(images, some, bias.dtype), bias[some], inner[some], tokens)
            part.products = list(itertools.islice(taken, len(data.states)))
            part.branches, part.variances = next(taken), next(taken)
            owed = plan.spread(gradients[0][some, images], tokens).flatten(2)
            Return(part, Gradients(*(whole[some] for whole in to)), owed).run()
        return None, None, *to[:3], to.inner.to(inner.dtype)


@dataclass
class Part:
    """The chain of k members on b images, N = bT tokens. Tokens come last in all arrays.

    Made by the forward pass and kept for the other: `products` a state, (k, rows, N), where qkv
    takes the place of its first summand; `branches` A, (k, M(R+1), N); `variances` (M, k, N), D
    times the variance.
    """

    plan: Plan
    data: Data
    bias: Tensor  # (k, M, 3R, 1)
    inner: Tensor  # (k, M(4R+1), M(R+1))
    tokens: int
    products: list[Tensor] = field(default_factory=list)
    branches: Tensor = field(init=False)
    variances: Tensor = field(init=False)

    def forward(self, matrices: Sequence[Tensor]) -> None:
        """Fill `products`, `branches` and `variances`; a state's matrix is (k, rows, D)."""
        plan, data, members, count = self.plan, self.data, len(self.bias), len(self.data.states[0])
        self.branches = data.states[0].new_zeros(members, self.inner.shape[2], count)
        self.branches[:, plan.rank :: plan.rank + 1] = 1 if data.keep is None else data.keep
        self.variances = self.bias.new_empty(plan.modules, members, count)
        exact = self.branches.to(self.bias.dtype)  # follows `branches`; the same if float32
        own = self.bias.new_zeros(members, count)  # what A alone adds to D variance
        for state, square, matrix, run in zip(
            data.states, data.squares, matrices, plan.modules_of, strict=True
        ):
            product = (matrix.flatten(0, 1) @ state.T).unflatten(0, matrix.shape[:2])
            self.products.append(product)
            qkvs, overlaps = self.cut(product, run)
            for j, qkv in zip(run, qkvs, strict=True):
                mine, (cross, added) = plan.block(j), plan.inner_blocks(j)
                used, seen = mine.start, mine.stop
                overlap = (overlaps[:, :used] * exact[:, :used]).sum(dim=1)
                self.variances[j] = square + own + 2 * overlap
                numerator = qkv
                if j:
                    numerator = _addmm(qkv, self.inner[:, cross, :used], self.branches[:, :used])
                scale = self.scale(j)
                qkv.copy_(torch.addcmul(self.bias[:, j], numerator.to(scale.dtype), scale))
                self._branch(j, qkv)
                exact[:, mine] = self.branches[:, mine]
                if j < plan.modules - 1:
                    step = _mm(self.inner[:, added, :seen], self.branches[:, :seen])
                    own += (step * exact[:, mine]).sum(dim=1)

    def _branch(self, module: int, qkv: Tensor) -> None:
        """Write A_j."""
        out = self.joined(self.attention(module, qkv).forward())  # (k, R, b, t)
        asked = out.shape[3]
        if self.data.keep is not None:
            out = out * self.tokens_of(self.data.keep[:, module, None])[..., :asked]
        branch = self.branches[:, self.plan.block(module)][:, :-1]
        self.tokens_of(branch)[..., :asked] = out

    def cut(self, product: Tensor, run: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Views on the rows of each module that reads the state, (k, 3R, N), and on the rest."""
        width = 3 * self.plan.rank
        at = len(run) * width
        return product[:, :at].split(width, dim=1), product[:, at:]

    def scale(self, module: int) -> Tensor:
        """1 / sqrt(variance + eps), (k, 1, N)."""
        variance = self.variances[module].clamp_min(0) / self.data.states[0].shape[1]
        return torch.rsqrt(variance + LN_EPS)[:, None]

    def tokens_of(self, array: Tensor) -> Tensor:
        """(…, N) → (…, b, T)."""
        return array.unflatten(-1, (-1, self.tokens))

    def heads(self, array: Tensor) -> Tensor:
        """(k, R, N) → (k b H, R/H, T), where possible a view."""
        heads = self.tokens_of(array.unflatten(1, (self.plan.heads, -1)))  # (k, H, R/H, b, T)
        return heads.permute(0, 3, 1, 2, 4).flatten(0, 2)

    def joined(self, array: Tensor) -> Tensor:
        """(k b H, R/H, t) → (k, R, b, t)."""
        heads = array.unflatten(0, (len(self.bias), -1, self.plan.heads))
        return heads.permute(0, 2, 3, 1, 4).flatten(1, 2)

    def attention(self, module: int, qkv: Tensor) -> Attention:
        q, k, v = (self.heads(part) for part in qkv.chunk(3, dim=1))
        return Attention(q[..., : self.plan.asked(module, self.tokens)], k, v)


@dataclass
class Return:
    """The way back through a part. `owed` (k, M(R+1), N) is what is known of A's gradient."""

    part: Part
    to: Gradients
    owed: Tensor
    exact: Tensor = field(init=False)  # A in the precision of sums
    inner: Tensor = field(init=False)
    after: Tensor = field(init=False)  # d_j and e_j A_j of the module at hand, (k, 4R+1, N)
    since: Tensor = field(init=False)  # e_j, (k, 1, N)

    def run(self) -> None:
        """Add the part's gradients, the last state's modules first."""
        part, plan = self.part, self.part.plan
        self.exact = part.branches.to(self.owed.dtype)
        self.inner = part.inner.clone()
        for j in range(plan.modules):  # x . H x has the gradient 2 H x
            self.inner[:, plan.inner_blocks(j)[1], plan.block(j)] *= 2
        members, _, count = self.owed.shape
        self.after = part.branches.new_empty(members, 4 * plan.rank + 1, count)
        self.since = self.owed.new_zeros(members, 1, count)
        for s, modules in reversed(list(enumerate(plan.modules_of))):
            self._state(s, modules)

    def _state(self, s: int, modules: Sequence[int]) -> None:
        """Through the modules that read state s, and to its matrices."""
        part, plan, product = self.part, self.part.plan, self.part.products[s]
        qkvs, overlaps = part.cut(product, modules)
        to_product = torch.empty_like(product)
        to_qkvs, to_overlaps = part.cut(to_product, modules)
        here = torch.zeros_like(self.since)  # 2 g of this state's modules so far
        for j, qkv, to_qkv in reversed(list(zip(modules, qkvs, to_qkvs, strict=True))):
            if j != modules[-1]:
                self._through_overlaps(plan.block(j), overlaps, to_overlaps, here)
            to_variance = self._module(j, qkv, to_qkv)
            here += 2 * to_variance
            self.since += to_variance
        first = slice(0, plan.block(modules[0]).start)
        self._through_overlaps(first, overlaps, to_overlaps, here)
        to_matrix = (to_product.flatten(0, 1) @ part.data.states[s]).unflatten(0, product.shape[:2])
        at = len(modules) * 3 * plan.rank
        mine = self.to.projections[:, modules[0] : modules[-1] + 1].flatten(1, 2)
        mine += to_matrix[:, :at]
        earlier = self.to.ups.flatten(1, 2)[:, : product.shape[1] - at]
        earlier += to_matrix[:, at:]

    def _through_overlaps(
        self, rows: slice, overlaps: Tensor, to_overlaps: Tensor, here: Tensor
    ) -> None:
        """Between A and the overlaps of its `rows` with a state."""
        self.owed[:, rows].addcmul_(overlaps[:, rows], here)
        torch.mul(self.exact[:, rows], here, out=to_overlaps[:, rows])

    def _module(self, j: int, qkv: Tensor, to_qkv: Tensor) -> Tensor:
        """Fill `to_qkv` with d_j, pass on to earlier A, and give g_j, (k, 1, N)."""
        plan, branches = self.part.plan, self.part.branches
        mine, (cross, added) = plan.block(j), plan.inner_blocks(j)
        both, used, seen = slice(cross.start, added.stop), mine.start, mine.stop
        due = self.owed[:, mine][:, :-1]  # the 1 is a constant
        due.addcmul_(_mm(self.inner[:, added, :seen][:, :-1], branches[:, :seen]), self.since)
        to_numerator, to_variance = self._attention(j, qkv, due)
        to_qkv.copy_(to_numerator)
        self.after[:, : 3 * plan.rank] = to_qkv
        torch.mul(self.exact[:, mine], self.since, out=self.after[:, 3 * plan.rank :])
        self.owed[:, :used] += _mm(self.inner[:, both, :used].mT, self.after)
        self.to.inner[:, both, :seen] += _mm(self.after, branches[:, :seen].mT)
        return to_variance

    def _attention(self, j: int, qkv: Tensor, due: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of A_j (k, R, N) to d_j and g_j; adds that of the bias."""
        part, keep = self.part, self.part.data.keep
        asked = part.plan.asked(j, part.tokens)
        out = self.exact[:, part.plan.block(j)][:, :-1]
        if keep is not None:
            factor = keep[:, j, None]
            due, out = due * factor, out / factor.clamp_min(1e-6)  # where 0, both are 0
        gradients = part.attention(j, qkv).backward(
            part.heads(due)[..., :asked], part.heads(out)[..., :asked]
        )
        to_qkv = due.new_zeros(qkv.shape) if asked < part.tokens else due.new_empty(qkv.shape)
        for to_one, gradient in zip(to_qkv.chunk(3, dim=1), gradients, strict=True):
            part.tokens_of(to_one)[..., : gradient.shape[2]] = part.joined(gradient)
        self.to.bias[:, j] += to_qkv.sum(dim=2, keepdim=True)
        stretch = ((qkv - part.bias[:, j]) * to_qkv).sum(dim=1, keepdim=True)
        scale, above = part.scale(j), part.variances[j][:, None] > 0
        dim = part.data.states[0].shape[1]
        return to_qkv.mul_(scale), stretch * scale.square() * above / (-2 * dim)


@dataclass(frozen=True)
class Attention:
    """softmax(q^T k) of (G, d, t) and (G, d, T), with v (G, d, T); nothing of it is kept.

    On a CPU plain products are about four times faster, forward and backward, than the fused
    kernel at d = 16, and exp alone than softmax, which first takes a row's maximum away: we do so
    only where numbers would leave their range.
    """

    q: Tensor
    k: Tensor
    v: Tensor

    def forward(self) -> Tensor:
        """(G, d, t)."""
        if not self.q.is_cpu:
            return self._fused(self.q, self.k, self.v)
        weights, total = self._weights()
        return (self.v @ weights.mT).to(total.dtype) / total

    def backward(self, gradient: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v from that of `forward`'s result `out`, (G, d, t)."""
        if not self.q.is_cpu:
            return self._fused_backward(gradient)
        weights, total = self._weights()
        dtype, scaled = weights.dtype, (gradient / total).to(weights.dtype)
        # Gradient of the scores: weights * (scaled v - ahead). The difference is taken within the
        # product, with `ahead` as two rows because one would lose its lower digits.
        ahead = (scaled * out).sum(dim=1, keepdim=True)
        high = ahead.to(dtype)
        low = (ahead - high).to(dtype)
        with_ones = nn.functional.pad(self.v, (0, 0, 0, 2), value=1.0)
        scores = torch.cat([scaled, -high, -low], dim=1).mT @ with_ones  # (G, t, T)
        scores.mul_(weights)
        return self.k @ scores.mT, self.q @ scores, scaled @ weights

    def _weights(self) -> tuple[Tensor, Tensor]:
        """Softmax before its division, (G, t, T), and its sums, (G, 1, t) in float32."""
        scores = self.q.mT @ self.k
        weights = scores.exp()
        sums = wide(weights.dtype)  # of bfloat16 they would be off by 0.15 % on average
        total = weights.sum(dim=-1, dtype=sums)
        least, most = torch.aminmax(total)
        limit = torch.finfo(weights.dtype).max ** 0.25
        if not (least > 1 / limit and most < limit):
            weights = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
            total = weights.sum(dim=-1, dtype=sums)
        return weights, total[:, None]

    @staticmethod
    def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.mT[:, None].contiguous() for part in (q, k, v))  # (batch, heads, T, d)
        return fused_attention(q, k, v)[:, 0].mT

    def _fused_backward(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.detach().requires_grad_() for part in (self.q, self.k, self.v))
        with torch.enable_grad():
            out = self._fused(q, k, v)
        to_q, to_k, to_v = torch.autograd.grad(out, (q, k, v), gradient.to(out.dtype))
        return to_q, to_k, to_v


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of (k, n, c) and (k, c, m); of one, the plain product is up to twice as fast."""
    return (a[0] @ b[0])[None] if len(a) == 1 else a @ b


def _addmm(start: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """start + a @ b, rounded once."""
    return torch.addmm(start[0], a[0], b[0])[None] if len(a) == 1 else torch.baddbmm(start, a, b)
