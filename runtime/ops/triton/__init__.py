"""The `moec::` operators as Triton kernels, for a GPU.

Nothing here imports Triton until `kernels_for` finds a GPU, so a machine without one needs no Triton. One
family of kernels a file:

    gate              scores, top-k, weights, and the table from tokens to experts
    tiles             which stretch of rows each program of a grouped product works on, decided on the device
    up, down          the grouped products of a feed-forward: gather on load, formula, scatter on store
    decode            the same for a few tokens: every used expert is read once, as fast as memory gives it
    gradients, outer  the products of the backward
    pointwise         from a formula to the Triton functions that the kernels call
    moe_ffn           the kernels put together, forward and backward

Nothing reads a value back to the host: how many rows an expert has stays on the device, grids are launched
for the most tiles there can be, and programs without a tile return at once. So all of it can stand in a CUDA
graph. Sums are taken in one order, without atomic additions: the same input gives the same bits.

Legend: T tokens, D model, F hidden, E experts, K chosen, N rows = T*K, L leaves of the formula. Slot
n = t*K + k is the k-th choice of token t.
"""
