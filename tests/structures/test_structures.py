"""The laws of every structure against its dense matrix.

A new one adds a row to `MAKERS` and a case to `written_out`.
"""

import io
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrocurv.structures import (
    BlockDiagonal,
    Dense,
    Diagonal,
    InverseDense,
    Kronecker,
    KroneckerEigen,
    Rescaled,
    Structure,
    automatic_ranks,
    cut,
)
from pyrocurv.structures.linalg import cholesky, eigh, eigh_psd, leading_eigh, scale_tril

FLOAT32, FLOAT64 = torch.float32, torch.float64


def spd(size: int, dtype: torch.dtype) -> Tensor:
    """A positive definite matrix with eigenvalues in about [0.5, 4]."""
    root = torch.randn(size, size, dtype=dtype) / size**0.5
    return root @ root.mT + torch.eye(size, dtype=dtype) / 2


def positive(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(*shape, dtype=dtype) + 0.5


def orthogonal(size: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=dtype)).Q


def kronecker(dtype: torch.dtype, output: int = 3, input: int = 2) -> Kronecker:
    return Kronecker(spd(output, dtype), spd(input, dtype))


def kronecker_eigen(dtype: torch.dtype) -> KroneckerEigen:
    return KroneckerEigen(
        orthogonal(3, dtype), orthogonal(2, dtype), positive(3, 2, dtype=dtype)
    )


def truncated(dtype: torch.dtype, ranks: tuple[int, int]) -> KroneckerEigen:
    """Sides of 5 and 4 rows, of which `ranks` directions are told apart."""
    bases, entries = [], []
    for size, rank in zip((5, 4), ranks, strict=True):
        bases.append(orthogonal(size, dtype)[:, :rank].contiguous())
        entries.append(rank + (rank < size))
    return KroneckerEigen(*bases, positive(*entries, dtype=dtype))


def groups(count: int, make: Callable[[], Structure]) -> Any:
    """`count` Kronecker structures of one shape as one, with a leading axis."""
    parts = [make() for _ in range(count)]
    names = [field.name for field in fields(parts[0])]
    return type(parts[0])(*(torch.stack([getattr(p, name) for p in parts]) for name in names))


def rescaled(inner: Structure, dtype: torch.dtype) -> Rescaled:
    return Rescaled(inner, positive(inner.size, dtype=dtype))


def in_order(dtype: torch.dtype) -> BlockDiagonal:
    return BlockDiagonal((Dense(spd(2, dtype)), kronecker(dtype)))


def shuffled(dtype: torch.dtype) -> BlockDiagonal:
    blocks = Dense(spd(2, dtype)), Diagonal(positive(3, dtype=dtype)), Dense(spd(4, dtype))
    return BlockDiagonal(blocks, torch.randperm(9).split([2, 3, 4]))


def nested(dtype: torch.dtype) -> BlockDiagonal:
    blocks = rescaled(kronecker_eigen(dtype), dtype), shuffled(dtype)
    return BlockDiagonal(blocks, torch.randperm(15).split([6, 9]))


MAKERS: dict[str, Callable[[torch.dtype], Structure]] = {
    "Dense": lambda dtype: Dense(spd(5, dtype)),
    "InverseDense": lambda dtype: InverseDense(scale_tril(spd(5, dtype))),
    "Diagonal": lambda dtype: Diagonal(positive(5, dtype=dtype)),
    "Rescaled(Dense)": lambda dtype: rescaled(Dense(spd(5, dtype)), dtype),
    "Rescaled(Diagonal)": lambda dtype: rescaled(Diagonal(positive(5, dtype=dtype)), dtype),
    "Kronecker": kronecker,
    "KroneckerEigen": kronecker_eigen,
    "KroneckerEigen, thin": lambda dtype: truncated(dtype, (2, 1)),
    "KroneckerEigen, thin output": lambda dtype: truncated(dtype, (2, 4)),
    "KroneckerEigen, thin input": lambda dtype: truncated(dtype, (5, 1)),
    "KroneckerEigen, thin by one": lambda dtype: truncated(dtype, (4, 3)),
    "KroneckerEigen, output thin by one": lambda dtype: truncated(dtype, (4, 4)),
    "KroneckerEigen, input thin by one": lambda dtype: truncated(dtype, (5, 3)),
    "Kronecker, groups": lambda dtype: groups(3, lambda: kronecker(dtype)),
    "Kronecker, units": lambda dtype: groups(4, lambda: kronecker(dtype, output=1)),
    "KroneckerEigen, groups": lambda dtype: groups(3, lambda: kronecker_eigen(dtype)),
    "KroneckerEigen, units": lambda dtype: groups(4, lambda: kronecker(dtype, output=1).eigen()),
    "KroneckerEigen, thin groups": lambda dtype: groups(2, lambda: truncated(dtype, (2, 1))),
    "KroneckerEigen, thin output groups": lambda dtype: groups(2, lambda: truncated(dtype, (2, 4))),
    "KroneckerEigen, thin input groups": lambda dtype: groups(2, lambda: truncated(dtype, (5, 1))),
    "Rescaled(KroneckerEigen, groups)": lambda dtype: rescaled(
        groups(3, lambda: kronecker_eigen(dtype)), dtype
    ),
    "Rescaled(KroneckerEigen, thin)": lambda dtype: rescaled(truncated(dtype, (2, 1)), dtype),
    "Rescaled(KroneckerEigen)": lambda dtype: rescaled(kronecker_eigen(dtype), dtype),
    "BlockDiagonal in order": in_order,
    "BlockDiagonal shuffled": shuffled,
    "BlockDiagonal nested": nested,
}
NO_SHIFT = {  # no scalar is one in their units
    "Rescaled(KroneckerEigen)", "Rescaled(KroneckerEigen, thin)",
    "Rescaled(KroneckerEigen, groups)", "BlockDiagonal nested",
}
VECTOR_SHIFT = {
    "Dense", "Diagonal", "InverseDense", "Rescaled(Dense)", "Rescaled(Diagonal)",
    "BlockDiagonal shuffled",
}
EXACT_LERP = {"Dense", "Diagonal", "InverseDense", "BlockDiagonal shuffled"}
SHIFTED = Dense, Diagonal, KroneckerEigen, Rescaled, BlockDiagonal

each = pytest.mark.parametrize("name", MAKERS)
both_types = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])


def make(name: str, dtype: torch.dtype = FLOAT64) -> tuple[Structure, Tensor]:
    """A structure and its matrix, written out here."""
    structure = MAKERS[name](dtype)
    return structure, written_out(structure)


def written_out(structure: Structure) -> Tensor:
    """The dense matrix straight from the definitions."""
    match structure:
        case Dense(matrix):
            return matrix
        case InverseDense(root):
            return torch.linalg.inv(root @ root.mT)
        case Diagonal(entries):
            return torch.diag(entries)
        case Rescaled(inner, root):
            return torch.diag(root) @ written_out(inner) @ torch.diag(root)
        case Kronecker(output, _) | KroneckerEigen(output, _, _) if output.dim() == 3:
            parts = zip(*tensors(structure), strict=True)
            return torch.block_diag(*(written_out(type(structure)(*part)) for part in parts))
        case Kronecker(output, input):
            return torch.kron(output, input)
        case KroneckerEigen(output_basis, input_basis, spectrum):
            spaces = projectors(output_basis), projectors(input_basis)
            return sum(
                spectrum[i, j] * torch.kron(output, input)
                for i, output in enumerate(spaces[0]) for j, input in enumerate(spaces[1])
            )
        case BlockDiagonal(blocks, index):
            matrix = torch.block_diag(*map(written_out, blocks))
            if not index:
                return matrix
            back = torch.cat(index).argsort()
            return matrix[back][:, back]
    raise AssertionError(f"written_out has no case for {type(structure).__name__}")


def projectors(basis: Tensor) -> list[Tensor]:
    """Onto each column of a basis and, if it is thin, onto all that is orthogonal to them."""
    onto = [torch.outer(column, column) for column in basis.mT]
    rest = torch.eye(len(basis), dtype=basis.dtype) - sum(onto)
    return onto if basis.shape[0] == basis.shape[1] else [*onto, rest]


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of some hundred operations on well conditioned matrices."""
    tolerance = 300 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def tensors(value: Any) -> list[Tensor]:
    """All tensors that a structure is made of."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Structure):
        return [t for field in fields(value) for t in tensors(getattr(value, field.name))]
    return [t for item in value for t in tensors(item)]


# ---- linear algebra -----------------------------------------------------------------------------


@both_types
@each
def test_dense(name: str, dtype: torch.dtype) -> None:
    structure, matrix = make(name, dtype)
    same(structure.dense(), matrix)
    assert structure.size == len(matrix)
    assert structure.dense().dtype == dtype


@both_types
@each
def test_matvec(name: str, dtype: torch.dtype) -> None:
    structure, matrix = make(name, dtype)
    x = torch.randn(2, 3, structure.size, dtype=dtype)
    same(structure @ x, x @ matrix)
    same(structure @ x[0, 0], matrix @ x[0, 0])


@both_types
@each
def test_solve(name: str, dtype: torch.dtype) -> None:
    structure, matrix = make(name, dtype)
    x = torch.randn(2, 3, structure.size, dtype=dtype)
    same(matrix @ structure.solve(x[0, 0]), x[0, 0])
    same(structure.solve(x) @ matrix, x)


@both_types
@each
def test_rsqrt(name: str, dtype: torch.dtype) -> None:
    structure, matrix = make(name, dtype)
    columns = structure.rsqrt(torch.eye(structure.size, dtype=dtype))  # its rows are R e_i
    same(columns.mT @ columns @ matrix, torch.eye(structure.size, dtype=dtype))
    z = torch.randn(structure.size, dtype=dtype)
    same(structure.rsqrt(z), z @ columns)


@both_types
@each
def test_a_solution_that_is_added_to_something(name: str, dtype: torch.dtype) -> None:
    structure, matrix = make(name, dtype)
    x, y = torch.randn(2, structure.size, dtype=dtype)
    expected = torch.linalg.solve(matrix, x)
    solution = structure.solution(x.clone())  # whose memory it may use
    same(solution.dot, x @ expected)
    total = y.clone()
    assert solution.add_to(total, -0.7) is total
    same(total, y - 0.7 * expected)


@both_types
@each
def test_rsqrt_in_the_memory_of_its_argument(name: str, dtype: torch.dtype) -> None:
    structure, _ = make(name, dtype)
    z = torch.randn(structure.size, dtype=dtype)
    expected = structure.rsqrt(z)
    found = structure.rsqrt_(z)
    assert found.shape == z.shape
    same(found, expected)


@both_types
@each
def test_scalars_and_diagonals(name: str, dtype: torch.dtype) -> None:
    structure, matrix = make(name, dtype)
    same(structure.logdet(), torch.logdet(matrix))
    same(structure.trace(), matrix.trace())
    same(structure.diag(), matrix.diag())
    same(structure.inverse_diag(), torch.linalg.inv(matrix).diag())
    same(structure.inverse_trace(), torch.linalg.inv(matrix).trace())
    same(structure.eigenvalues(), torch.linalg.eigvalsh(matrix))


# ---- sums and products --------------------------------------------------------------------------


@both_types
@each
@pytest.mark.parametrize("as_tensor", [False, True])
def test_scale(name: str, dtype: torch.dtype, as_tensor: bool) -> None:
    structure, matrix = make(name, dtype)
    scaled = structure.scale(torch.tensor(2.5, dtype=dtype) if as_tensor else 2.5)
    assert type(scaled) is type(structure)
    same(scaled.dense(), 2.5 * matrix)
    same(scaled.logdet(), torch.logdet(2.5 * matrix))


@both_types
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", [name for name in MAKERS if name not in NO_SHIFT])
def test_shift_by_a_scalar(name: str, dtype: torch.dtype, as_tensor: bool) -> None:
    structure, matrix = make(name, dtype)
    shifted = structure.shift(torch.tensor(0.7, dtype=dtype) if as_tensor else 0.7)
    expected = matrix + 0.7 * torch.eye(structure.size, dtype=dtype)
    same(shifted.dense(), expected)
    same(shifted.logdet(), torch.logdet(expected))
    assert isinstance(shifted, SHIFTED)


@both_types
@pytest.mark.parametrize("name", sorted(VECTOR_SHIFT))
def test_shift_by_a_vector(name: str, dtype: torch.dtype) -> None:
    structure, matrix = make(name, dtype)
    delta = positive(structure.size, dtype=dtype)
    same(structure.shift(delta).dense(), matrix + torch.diag(delta))


@pytest.mark.parametrize("name", [
    "Kronecker", "KroneckerEigen", "KroneckerEigen, thin", "KroneckerEigen, groups",
    "BlockDiagonal in order",
])
def test_a_kronecker_structure_refuses_a_vector(name: str) -> None:
    structure, _ = make(name)
    with pytest.raises(ValueError, match="takes a scalar, got shape"):
        structure.shift(positive(structure.size, dtype=FLOAT64))


@pytest.mark.parametrize("name", sorted(NO_SHIFT))
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_rescaled_kronecker_refuses_any_shift(name: str, as_tensor: bool) -> None:
    structure, _ = make(name)
    delta = positive(structure.size, dtype=FLOAT64) if as_tensor else 0.7
    with pytest.raises(ValueError, match="takes a scalar, got shape"):
        structure.shift(delta)


def test_a_rescaled_kronecker_refuses_what_is_a_scalar_in_its_units_too() -> None:
    structure = rescaled(kronecker_eigen(FLOAT64), FLOAT64)
    with pytest.raises(ValueError, match="takes a scalar, got shape"):
        structure.shift(0.7 * structure.root.square())


def test_kronecker_shift_has_no_damping_of_the_factors() -> None:
    """(G ⊗ A + δ I)⁻¹, where (G + √δ I) ⊗ (A + √δ I) would be far off."""
    structure, matrix = make("Kronecker")
    shifted, eye = structure.shift(0.7), torch.eye(structure.size, dtype=FLOAT64)
    same(shifted.solve(eye), torch.linalg.inv(matrix + 0.7 * eye))
    factored = torch.kron(*(f + 0.7**0.5 * torch.eye(len(f), dtype=FLOAT64)
                            for f in (structure.output, structure.input)))
    assert (factored - shifted.dense()).norm() > 0.1 * shifted.dense().norm()


def test_a_singular_kronecker_can_be_shifted() -> None:
    a = torch.randn(1, 3, dtype=FLOAT64)
    structure = Kronecker(a[:, :2].mT @ a[:, :2], a.mT @ a)
    eye = torch.eye(6, dtype=FLOAT64)
    same(structure.shift(0.5).dense(), written_out(structure) + 0.5 * eye)
    assert (structure.eigenvalues() >= 0).all()


def test_rescaled_factors() -> None:
    """`Kronecker.rescaled` is D⁻¹ M D⁻¹, the way into the units that `Rescaled` maps back from."""
    structure, matrix = make("Kronecker")
    p, r = positive(3, dtype=FLOAT64), positive(2, dtype=FLOAT64)
    root = torch.outer(p, r).flatten()
    inner = structure.rescaled(p, r)
    same(inner.dense(), matrix / torch.outer(root, root))
    same(Rescaled(inner.shift(0.7), root).dense(), matrix + torch.diag(0.7 * root.square()))


# ---- the nearest positive semi-definite matrix --------------------------------------------------


INDEFINITE: dict[str, Callable[[], Structure]] = {
    "Dense": lambda: Dense(symmetric(5)),
    "Diagonal": lambda: Diagonal(torch.randn(5, dtype=FLOAT64)),
    "Kronecker": lambda: Kronecker(symmetric(3), spd(2, FLOAT64)),
    "Kronecker, both": lambda: Kronecker(symmetric(3), symmetric(2)),
    "Kronecker, groups": lambda: Kronecker(
        torch.stack([symmetric(3), symmetric(3)]), torch.stack([spd(2, FLOAT64), symmetric(2)])
    ),
    "KroneckerEigen": lambda: signed(kronecker_eigen(FLOAT64)),
    "KroneckerEigen, thin": lambda: signed(truncated(FLOAT64, (2, 1))),
    "BlockDiagonal": lambda: BlockDiagonal(
        (Dense(symmetric(2)), Diagonal(torch.randn(3, dtype=FLOAT64)), Dense(symmetric(4))),
        torch.randperm(9).split([2, 3, 4]),
    ),
}


def symmetric(size: int) -> Tensor:
    """Of eigenvalues of both signs."""
    basis = orthogonal(size, FLOAT64)
    values = positive(size, dtype=FLOAT64) * torch.tensor([-1.0, 1.0]).repeat(size)[:size]
    return (basis * values) @ basis.mT


def signed(eigen: KroneckerEigen) -> KroneckerEigen:
    spectrum = eigen.spectrum - eigen.spectrum.median()
    return KroneckerEigen(eigen.output_basis, eigen.input_basis, spectrum)


@pytest.mark.parametrize("name", INDEFINITE)
def test_an_indefinite_structure(name: str) -> None:
    """Its eigenvalues and shifts keep their signs; `psd` is the nearest without negative ones."""
    structure = INDEFINITE[name]()
    matrix = written_out(structure)
    values, vectors = torch.linalg.eigh(matrix)
    assert values[0] < -0.01 < 0.01 < values[-1]
    same(structure.dense(), matrix)
    same(structure.eigenvalues(), values)
    same(structure.shift(0.7).dense(), matrix + 0.7 * torch.eye(len(matrix), dtype=FLOAT64))
    same(structure.psd().dense(), (vectors * values.clamp(min=0)) @ vectors.mT)
    assert (structure.psd().eigenvalues() >= -1e-14).all()


@both_types
@each
def test_psd_of_a_positive_matrix_is_itself(name: str, dtype: torch.dtype) -> None:
    structure, matrix = make(name, dtype)
    same(structure.psd().dense(), matrix)


def test_psd_of_a_rescaled_matrix_is_the_nearest_in_its_units() -> None:
    inner, root = Dense(symmetric(4)), positive(4, dtype=FLOAT64)
    expected = inner.psd().dense() * torch.outer(root, root)
    same(Rescaled(inner, root).psd().dense(), expected)


# ---- averages -----------------------------------------------------------------------------------


@both_types
@pytest.mark.parametrize("name", sorted(EXACT_LERP))
def test_lerp_of_linear_structures(name: str, dtype: torch.dtype) -> None:
    structure, matrix = make(name, dtype)
    other = structure.map(lambda t: t if t.dtype == torch.int64 else t.square())
    same(structure.lerp(other, 0.3).dense(), 0.7 * matrix + 0.3 * written_out(other))
    same(structure.lerp(other, 0.0).dense(), matrix)
    same(structure.lerp(other, 1.0).dense(), written_out(other))


def test_lerp_of_kronecker_is_that_of_its_factors() -> None:
    a, b = kronecker(FLOAT64), kronecker(FLOAT64)
    mean = a.lerp(b, 0.3)
    same(mean.output, 0.7 * a.output + 0.3 * b.output)
    same(mean.input, 0.7 * a.input + 0.3 * b.input)


RANKS = [(5, 4), (2, 1), (2, 4), (5, 1)]  # of sides of 5 and 4: full, thin, one of either


@pytest.mark.parametrize("ranks", RANKS)
def test_lerp_of_kronecker_eigen_in_one_basis(ranks: tuple[int, int]) -> None:
    a = truncated(FLOAT64, ranks)
    copy = KroneckerEigen(a.output_basis.clone(), a.input_basis.clone(), a.spectrum.square())
    for b in (KroneckerEigen(a.output_basis, a.input_basis, copy.spectrum), copy):
        same(a.lerp(b, 0.3).dense(), 0.7 * written_out(a) + 0.3 * written_out(b))


@pytest.mark.parametrize("theirs", RANKS)
@pytest.mark.parametrize("ours", RANKS)
def test_lerp_of_kronecker_eigen_is_the_nearest_in_the_others_basis(
    ours: tuple[int, int], theirs: tuple[int, int]
) -> None:
    """The Frobenius projection: the mean over each eigenspace, so the trace is kept."""
    a, b = truncated(FLOAT64, ours), truncated(FLOAT64, theirs)
    mean = a.lerp(b, 0.3)
    assert torch.equal(mean.output_basis, b.output_basis)
    assert torch.equal(mean.input_basis, b.input_basis)
    average = 0.7 * written_out(a) + 0.3 * written_out(b)
    for i, output in enumerate(projectors(b.output_basis)):
        for j, input in enumerate(projectors(b.input_basis)):
            onto = torch.kron(output, input)
            same(mean.spectrum[i, j], (onto * average).sum() / onto.trace())
    same(mean.trace(), average.trace())


@pytest.mark.parametrize("ranks", RANKS)
def test_a_kronecker_in_its_eigenbasis(ranks: tuple[int, int]) -> None:
    """Exact where both sides are full; a thin side keeps its leading part and its trace."""
    structure = kronecker(FLOAT64, output=5, input=4)
    eigen = structure.eigen(ranks)
    assert [basis.shape[1] for basis in (eigen.output_basis, eigen.input_basis)] == list(ranks)
    sides = []
    for factor, rank in zip((structure.output, structure.input), ranks, strict=True):
        values, vectors = torch.linalg.eigh(factor)
        values[: len(values) - rank] = values[: len(values) - rank].mean()
        sides.append(vectors @ torch.diag(values) @ vectors.mT)
    same(eigen.dense(), torch.kron(*sides))
    same(eigen.trace(), written_out(structure).trace())
    if ranks == (5, 4):
        same(eigen.dense(), written_out(structure))


def test_groups_in_their_eigenbases() -> None:
    """Group by group, in every verb that makes a new structure from factors or bases."""
    a, b = (groups(3, lambda: kronecker(FLOAT64, output=4, input=5)) for _ in range(2))
    p, r = positive(3, 4, dtype=FLOAT64), positive(3, 5, dtype=FLOAT64)
    for ranks in ((4, 5), (2, 3)):
        thin, other = a.eigen(ranks), b.eigen(ranks)
        found = (
            thin, a.lerp(b, 0.3), a.rescaled(p, r), thin.lerp(other, 0.3),
            thin.change_basis(other.output_basis, other.input_basis), a.nearest_kronecker_sum(b),
        )
        for group in range(3):
            one, two = Kronecker(a.output[group], a.input[group]), Kronecker(*(
                factor[group] for factor in (b.output, b.input)))
            alone, another = one.eigen(ranks), two.eigen(ranks)
            expected = (
                alone, one.lerp(two, 0.3), one.rescaled(p[group], r[group]),
                alone.lerp(another, 0.3),
                alone.change_basis(
                    another.output_basis, another.input_basis
                ), one.nearest_kronecker_sum(two),
            )
            rows = slice(20 * group, 20 * (group + 1))
            for whole, part in zip(found, expected, strict=True):
                same(whole.dense()[rows, rows], part.dense())


@pytest.mark.parametrize(
    ("sides", "ranks"),
    [((1, 1), (1, 1)), ((160, 160), (160, 160)), ((10, 161), (10, 16)), ((64, 785), (64, 16)),
     ((512, 785), (16, 16)), ((161, 3), (16, 3))],
)
def test_ranks_of_sides(sides: tuple[int, int], ranks: tuple[int, int]) -> None:
    assert automatic_ranks(*sides) == ranks


def test_lerp_of_rescaled() -> None:
    a, b = (Dense(spd(4, FLOAT64)) for _ in range(2))
    root = positive(4, dtype=FLOAT64)
    mean = Rescaled(a, root).lerp(Rescaled(b, root.clone()), 0.3)
    same(mean.dense(), 0.7 * written_out(Rescaled(a, root)) + 0.3 * written_out(Rescaled(b, root)))


def test_lerp_of_blocks() -> None:
    a, b = in_order(FLOAT64), in_order(FLOAT64)
    parts = zip(a.blocks, b.blocks, strict=True)
    same(
        a.lerp(b, 0.3).dense(),
        torch.block_diag(*(one.lerp(other, 0.3).dense() for one, other in parts)),
    )


# ---- diagonal blocks of the factors -------------------------------------------------------------


def block_mask(size: int, num_blocks: int) -> Tensor:
    parts = torch.arange(size).tensor_split(min(num_blocks, size))
    return torch.block_diag(*(torch.ones(len(part), len(part), dtype=FLOAT64) for part in parts))


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 9])
def test_cut(num_blocks: int, lead: tuple[int, ...]) -> None:
    """The sizes of the blocks are `torch.tensor_split`'s; from n on the diagonal is left."""
    matrix = torch.randn(*lead, 7, 7, dtype=FLOAT64)
    found = cut(matrix, num_blocks)
    assert torch.equal(found, matrix * block_mask(7, num_blocks))
    if num_blocks >= 7:
        assert torch.equal(found, torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)))


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 9])
def test_eigh_of_diagonal_blocks(num_blocks: int, lead: tuple[int, ...]) -> None:
    root = torch.randn(*lead, 7, 7, dtype=FLOAT64)
    matrix = root @ root.mT
    values, vectors = eigh_psd(matrix, num_blocks)
    expected = cut(matrix, num_blocks)
    same(vectors @ torch.diag_embed(values) @ vectors.mT, expected)
    same(vectors.mT @ vectors, torch.eye(7, dtype=FLOAT64).expand_as(matrix))
    same(values, torch.linalg.eigvalsh(expected))
    together = vectors.abs() @ vectors.abs().mT  # rows that any vector has to do with
    assert not (together * (1 - block_mask(7, num_blocks))).any()


@pytest.mark.parametrize("num_blocks", [(1, 1), (2, 1), (2, 3), (5, 4)])
def test_a_kronecker_of_diagonal_blocks(num_blocks: tuple[int, int]) -> None:
    """From K-FAC, with one block, to the diagonals of its factors."""
    structure = kronecker(FLOAT64, output=5, input=4)
    sides = cut(structure.output, num_blocks[0]), cut(structure.input, num_blocks[1])
    same(structure.eigen(num_blocks=num_blocks).dense(), torch.kron(*sides))
    thin = structure.eigen((2, 3), num_blocks)
    same(thin.dense(), Kronecker(*sides).eigen((2, 3)).dense())
    if num_blocks == (5, 4):
        same(structure.eigen(num_blocks=num_blocks).dense(), torch.diag(structure.diag()))


# ---- sums of Kronecker products -----------------------------------------------------------------


def rearranged(matrix: Tensor, output: int, input: int) -> Tensor:
    """Rows vec(G) vec(A)ᵀ in place of G ⊗ A (Van Loan & Pitsianis)."""
    return matrix.reshape(output, input, output, input).permute(0, 2, 1, 3).reshape(output**2, -1)


def low_rank(size: int, rank: int) -> Tensor:
    root = torch.randn(size, rank, dtype=FLOAT64)
    return root @ root.mT


@both_types
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e6, 1e-6), (1e-3, 5.0)])
def test_nearest_kronecker_to_a_sum(scales: tuple[float, float], dtype: torch.dtype) -> None:
    for _ in range(5):
        a = Kronecker(low_rank(3, 2) * scales[0], low_rank(4, 2))
        b = Kronecker(low_rank(3, 2), low_rank(4, 2) * scales[1])
        total = written_out(a) + written_out(b)
        u, s, v = torch.linalg.svd(rearranged(total, 3, 4))
        best = s[0] * torch.outer(u[:, 0], v[0])
        found = a.map(lambda t: t.to(dtype)).nearest_kronecker_sum(b.map(lambda t: t.to(dtype)))
        assert found.output.dtype == dtype
        error = rearranged(found.dense().double(), 3, 4) - best
        # the leading direction is lost in rounding as its gap closes
        gap = (s[0] - s[1]) / s[0]
        assert error.norm() <= 300 * torch.finfo(dtype).eps / gap * s[0]
        for factor in (found.output, found.input):
            values = torch.linalg.eigvalsh(factor)
            assert values[0] >= -300 * torch.finfo(dtype).eps * values[-1]


def test_nearest_kronecker_to_a_sum_that_is_one() -> None:
    a = kronecker(FLOAT64)
    for b in (Kronecker(a.output, spd(2, FLOAT64)), Kronecker(spd(3, FLOAT64), a.input)):
        same(a.nearest_kronecker_sum(b).dense(), written_out(a) + written_out(b))
        same(b.nearest_kronecker_sum(a).dense(), written_out(a) + written_out(b))
    nothing = a.map(torch.zeros_like)
    same(a.nearest_kronecker_sum(nothing).dense(), written_out(a))
    same(nothing.nearest_kronecker_sum(a).dense(), written_out(a))
    assert torch.equal(nothing.nearest_kronecker_sum(nothing).dense(), nothing.dense())


def test_nearest_kronecker_to_a_sum_of_equal_and_orthogonal_products() -> None:
    """Then one is as near as the other: any best approximation of rank 1 will do."""
    first, second = (torch.diag(torch.eye(2, dtype=FLOAT64)[i]) for i in range(2))
    a, b = Kronecker(first, first), Kronecker(second, second)
    error = a.nearest_kronecker_sum(b).dense() - written_out(a) - written_out(b)
    same(error.norm(), torch.ones((), dtype=FLOAT64))


# ---- values -------------------------------------------------------------------------------------


@each
def test_map(name: str) -> None:
    structure, matrix = make(name)
    kept = structure.map(lambda t: t)
    assert all(a is b for a, b in zip(tensors(structure), tensors(kept), strict=True))
    single = structure.map(lambda t: t.float() if t.is_floating_point() else t)
    assert type(single) is type(structure)
    assert {t.dtype for t in tensors(single)} <= {FLOAT32, torch.int64}
    same(single.dense(), matrix.float())


@both_types
@each
def test_state_through_a_file(name: str, dtype: torch.dtype) -> None:
    structure, _ = make(name, dtype)
    file = io.BytesIO()
    torch.save(structure.state(), file)
    file.seek(0)
    again = Structure.from_state(torch.load(file, weights_only=True))
    assert type(again) is type(structure)
    pairs = zip(tensors(structure), tensors(again), strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    assert torch.equal(again.dense(), structure.dense())


@each
def test_no_verb_changes_its_operands(name: str) -> None:
    structure, _ = make(name)
    other = structure.map(torch.clone)
    x, delta = torch.randn(structure.size, dtype=FLOAT64), torch.tensor(0.7, dtype=FLOAT64)
    operands = [*tensors(structure), *tensors(other), x, delta]
    before = [t.clone() for t in operands]
    structure.lerp(other, 0.3), structure.scale(delta), structure @ x, structure.solve(x)
    structure.rsqrt(x), structure.logdet(), structure.trace(), structure.diag()
    structure.inverse_diag(), structure.eigenvalues(), structure.dense()
    if name not in NO_SHIFT:
        structure.shift(delta)
    assert all(torch.equal(a, b) for a, b in zip(before, operands, strict=True))
    assert all(t._version == b._version for t, b in zip(operands, before, strict=True))
    with pytest.raises(AttributeError):
        setattr(structure, fields(structure)[0].name, None)


@pytest.mark.parametrize("name", [name for name in MAKERS if "Block" not in name])
def test_gradients_flow(name: str) -> None:
    """`rsample` of a guide needs rsqrt, matvec and logdet differentiable in the tensors."""
    structure, _ = make(name)
    leaves: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        leaves.append(t.clone().requires_grad_())
        return leaves[-1]

    live = structure.map(leaf)
    z = torch.randn(structure.size, dtype=FLOAT64)
    (live.rsqrt(z).sum() + (live @ z).sum() + live.logdet()).backward()
    assert all(t.grad is not None and torch.isfinite(t.grad).all() for t in leaves)


# ---- linalg -------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ["raises", "no kernel", "silent NaN"])
def test_eigh_tries_again_in_float64(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, real, seen = spd(4, FLOAT32), torch.linalg.eigh, list[torch.dtype]()

    def flaky(a: Tensor) -> Any:
        seen.append(a.dtype)
        if len(seen) > 1:
            return real(a)
        if failure == "raises":
            raise torch.linalg.LinAlgError("no convergence")
        if failure == "no kernel":
            raise NotImplementedError("aten::_linalg_eigh")
        values, vectors = real(a)
        return values, vectors * torch.nan

    monkeypatch.setattr(torch.linalg, "eigh", flaky)
    values, vectors = eigh(matrix)
    assert seen == [FLOAT32, FLOAT64]
    assert values.dtype == vectors.dtype == FLOAT32
    same(vectors @ torch.diag(values) @ vectors.mT, matrix)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_eigh_of_a_matrix_that_is_not_finite(bad: float) -> None:
    matrix = spd(3, FLOAT64)
    matrix[1, 0] = bad
    with pytest.raises(torch.linalg.LinAlgError):
        eigh(matrix)


@pytest.mark.parametrize("failure", ["raises", "silent NaN"])
def test_eigh_that_fails_twice(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(a: Tensor) -> Any:
        if failure == "raises":
            raise torch.linalg.LinAlgError("no convergence")
        return a.diagonal(), a * torch.nan

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.raises(torch.linalg.LinAlgError):
        eigh(spd(3, FLOAT64))


def test_eigh_psd_has_no_negative_eigenvalues() -> None:
    a = torch.randn(2, 6)
    values, vectors = eigh_psd(a.mT @ a)
    assert (values >= 0).all() and vectors.shape == (6, 6)


@both_types
def test_cholesky(dtype: torch.dtype) -> None:
    matrix = spd(5, dtype).requires_grad_()
    factor = cholesky(matrix)
    assert torch.equal(factor, factor.tril())
    same(factor @ factor.mT, matrix)
    assert torch.autograd.grad(factor.sum(), matrix)[0].isfinite().all()


def test_cholesky_of_a_matrix_that_rounding_has_made_indefinite() -> None:
    a = torch.randn(5, 50)
    matrix = 1e8 * a.mT @ a + torch.eye(50)
    with pytest.warns(UserWarning, match="50 rows is indefinite by rounding"):
        factor = cholesky(matrix)
    assert factor.dtype == FLOAT32 and torch.equal(factor, factor.tril())
    rounding = 50 * torch.finfo(FLOAT32).eps * matrix.diag().max()
    assert (factor @ factor.mT - matrix).abs().max() <= 2 * rounding


@pytest.mark.filterwarnings("ignore:a matrix of")
@pytest.mark.parametrize("sign", [-1.0, torch.nan])
def test_cholesky_of_a_matrix_that_is_indefinite_by_far(sign: float) -> None:
    matrix = torch.eye(3)
    matrix[1, 1] = sign
    with pytest.raises(torch.linalg.LinAlgError):
        cholesky(matrix)


@both_types
def test_scale_tril(dtype: torch.dtype) -> None:
    precision = spd(5, dtype)
    factor = scale_tril(precision)
    assert torch.equal(factor, factor.tril()) and (factor.diag() > 0).all()
    same(factor @ factor.mT @ precision, torch.eye(5, dtype=dtype))


def test_what_is_outside_of_a_basis_is_no_difference_of_large_numbers() -> None:
    """A unit vector inside of the basis, eigenvalues 10⁸ there and 1 outside, single precision."""
    basis = torch.linalg.qr(torch.randn(200, 3)).Q
    basis[:, 0] = torch.eye(200)[0]
    basis = torch.linalg.qr(basis).Q
    spectrum = torch.tensor([[1e8, 1e8, 1e8, 1.0]])
    one = torch.ones(1, 1)
    precision = KroneckerEigen(one, basis, spectrum)
    exact = KroneckerEigen(one.double(), basis.double(), spectrum.double())
    assert (precision.inverse_diag() > 0).all()
    torch.testing.assert_close(
        precision.inverse_diag().double(), exact.inverse_diag(), rtol=1e-4, atol=1e-10
    )


# ---- a few leading eigenvectors of a wide matrix ------------------------------------------------


@pytest.mark.parametrize("restarts", [20, 0], ids=["Krylov", "fallback"])
@pytest.mark.parametrize("rows", [4, 400], ids=["low rank", "full rank"])
@both_types
def test_leading_eigenvectors(
    dtype: torch.dtype, rows: int, restarts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyrocurv.structures.linalg.MAX_RESTARTS", restarts)
    x = torch.randn(rows, 200, dtype=dtype) * torch.linspace(0.1, 2, 200, dtype=dtype)
    matrix = x.mT @ x
    values, vectors = leading_eigh(matrix, 5)
    wanted, _ = torch.linalg.eigh(matrix.double())
    scale, loose = float(wanted[-1]), 1e-9 if dtype == FLOAT64 else 2e-5
    torch.testing.assert_close(values.double(), wanted[-5:], atol=loose * scale, rtol=0)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(5, dtype=dtype), atol=1e-5, rtol=0)
    residual = matrix.double() @ vectors.double() - vectors.double() * values.double()
    assert residual.abs().max() < loose * scale


def test_a_wide_truncated_factor_needs_only_its_leading_eigenvectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same matrix as from all of them; an indefinite factor keeps its trace too."""
    root = torch.randn(400, 200).double() * torch.linspace(0.1, 2, 200).double()
    for shift in (0.0, 300.0):
        factor = root.mT @ root - shift * torch.eye(200).double()
        matrix = Kronecker(spd(2, FLOAT64), factor)
        wanted = matrix.eigen((2, 3)).dense()
        with monkeypatch.context() as patch:
            patch.setattr("pyrocurv.structures.kronecker.MIN_KRYLOV", 100)
            patch.setattr("pyrocurv.structures.kronecker.eigh_blocks", lambda m, _: eigh(m))
            found = matrix.eigen((2, 3)).dense()
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


@both_types
def test_the_covariance_factor_of_a_large_precision_is_inverted_by_halves(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = spd(61, dtype)
    monkeypatch.setattr("pyrocurv.structures.linalg.MAX_SOLVE", 8)
    root = scale_tril(precision)
    assert torch.equal(root, root.tril())
    same(root @ root.mT @ precision, torch.eye(61, dtype=dtype))
