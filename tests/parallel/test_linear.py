"""Linear layers: right, bitwise the same for a row in any batch, one copy in memory."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from parallel.linear import Linear, can_pack

CPU = torch.device("cpu")
SIZES = [(48, 144), (72, 173), (512, 1024), (100, 7), (1, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_is_the_matrix_product(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(inputs)
    weight, x = torch.randn(outputs, inputs, dtype=dtype), torch.randn(5, inputs, dtype=dtype)
    b = torch.randn(outputs, dtype=dtype) if bias else None
    exact = F.linear(x.double(), weight.double(), b.double() if b is not None else None)
    result = Linear(weight, b)(x)
    assert result.dtype == dtype
    assert result.is_contiguous()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}[dtype]
    torch.testing.assert_close(result.double(), exact, atol=tolerance, rtol=1e-2)


@pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="no oneDNN here")
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_a_packed_row_has_the_same_bits_beside_any_number_of_rows(inputs: int, outputs: int) -> None:
    torch.manual_seed(inputs)
    linear = Linear(torch.randn(outputs, inputs))
    x = torch.randn(257, inputs)
    whole = linear(x)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 17, 31, 33, 64, 65, 128, 200, 256):
        assert torch.equal(linear(x[:rows].contiguous()), whole[:rows])
        assert torch.equal(linear(x[-rows:].contiguous()), whole[-rows:])


@pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="no oneDNN here")
def test_the_plain_weight_is_let_go() -> None:
    weight = torch.randn(64, 32)
    watched = weakref.ref(weight)
    linear = Linear(weight)
    del weight
    gc.collect()
    assert watched() is None
    assert linear(torch.randn(2, 32)).shape == (2, 64)
