"""The projection to query, key and value, against the same done for all tokens and then picked."""

import torch
import torch.nn.functional as F

from tokencache_kernels import ops
from tokencache_kernels.testing import randn, random_indices

OPS = ("project_qkv_",)


def test_projection_stores_keys_and_values_in_their_rows(backend):
    """With rotation and norm, against the same done for all tokens and then picked."""
    B, N, S, H, E, K = 2, 9, 4, 2, 8, 12
    x, weight, bias = randn(B, N, K), randn(3 * H * E, K), randn(3 * H * E)
    gain_q, gain_k = randn(E), randn(E, seed=1)
    angle = randn(N, E // 2).repeat_interleave(2, -1)
    indices = random_indices(B, N, S, num_empty=1)
    keys, values = randn(B, N, H, E), randn(B, N, H, E, seed=1)

    def rotate(y):
        pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
        turn = torch.polar(torch.ones(N, E // 2), angle[:, ::2])[None, :, None]
        return torch.view_as_real(pairs * turn).flatten(-2)

    q, k, v = (x @ weight.T + bias).unflatten(-1, (3, H, E)).unbind(2)
    q = rotate(F.rms_norm(q, (E,), gain_q, 1e-6))
    k = rotate(F.rms_norm(k, (E,), gain_k, 1e-6))
    wanted_keys, wanted_values = keys.clone(), values.clone()
    for b, row in enumerate(indices.tolist()):
        for token in row:
            if token >= 0:
                wanted_keys[b, token], wanted_values[b, token] = k[b, token], v[b, token]

    packed = ops.gather_rows(x, indices)
    query, new_keys, new_values = ops.project_qkv(
        keys, values, packed, indices, weight, bias, norm=ops.QkNorm(gain_q, gain_k),
        rotary=(angle.cos(), angle.sin()), backend=backend,
    )  # fmt: skip

    torch.testing.assert_close(new_keys, wanted_keys)
    torch.testing.assert_close(new_values, wanted_values)
    live = indices >= 0
    assert not torch.equal(new_keys, keys)
    for b in range(B):
        torch.testing.assert_close(query[b, live[b]], q[b, indices[b][live[b]].long()])
