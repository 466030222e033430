# Addresses come from Tensor.data_ptr(); sizes, strides (in elements) and geometry as in csrc/cpu/ops.h.

compiler: str
version: str
cuda: str
cuda_archs: str

def isa_built() -> list[str]: ...
def isa_refusal(level: str, /) -> str: ...
def isa_best() -> str: ...
def isa() -> str: ...
def set_isa(level: str, /) -> None: ...
def conv2d_tap(x: int, coord: int, step: int, out: int, /, *sizes: int) -> None: ...
def channel_conv2d(delta: int, channel: int, weight: int, out: int, /, *sizes: int) -> None: ...
def dense_conv2d(delta: int, weight: int, out: int, /, *sizes: int) -> None: ...
def channel_batch_norm(
    delta: int,
    channel: int,
    x: int,
    mean: int,
    var: int,
    gamma: int,
    y: int,
    gap: int,
    out: int,
    eps: float,
    /,
    *sizes: int,
) -> None: ...
def dense_batch_norm(
    delta: int,
    zc: int,
    var: int,
    gamma: int,
    residual: int,
    residual_channel: int,
    y: int,
    gap: int,
    out: int,
    eps: float,
    /,
    *sizes: int,
) -> None: ...
def conv2d_tap_batch_norm(
    x: int, coord: int, step: int, zc: int, var: int, gamma: int, beta: int, out: int, eps: float, /, *sizes: int
) -> None: ...
def channel_conv2d_batch_norm(
    delta: int,
    channel: int,
    weight: int,
    zc: int,
    var: int,
    gamma: int,
    beta: int,
    out: int,
    eps: float,
    /,
    *sizes: int,
) -> None: ...
def channel_linear_cross_entropy(
    delta: int, channel: int, weight: int, log_probs: int, probs: int, target: int, out: int, /, *sizes: int
) -> None: ...
def cross_entropy_difference(
    log_probs: int, probs: int, target: int, dlogits: int, out: int, /, *sizes: int
) -> None: ...
def gelu_difference(delta: int, z: int, out: int, /, *sizes: int) -> None: ...
def layer_norm_difference(delta: int, zc: int, var: int, gamma: int, out: int, eps: float, /, *sizes: int) -> None: ...
def softmax_difference(delta: int, p: int, out: int, /, *sizes: int) -> None: ...
def attention_difference(
    dq: int,
    dk: int,
    dv: int,
    q: int,
    k: int,
    v: int,
    p: int,
    out: int,
    strides: int,
    scale: float,
    /,
    *sizes: int,
) -> None: ...
def mlp_difference(
    delta: int,
    zc: int,
    var: int,
    gamma: int,
    up: int,
    z: int,
    down: int,
    residual: int,
    out: int,
    eps: float,
    /,
    *sizes: int,
) -> None: ...
def linear_difference(
    delta: int,
    zc: int,
    var: int,
    gamma: int,
    weight: int,
    residual: int,
    out: int,
    eps: float,
    /,
    *sizes: int,
) -> None: ...
def self_attention_difference(
    delta: int,
    zc: int,
    var: int,
    gamma: int,
    weight: int,
    q: int,
    k: int,
    v: int,
    p: int,
    project: int,
    residual: int,
    out: int,
    eps: float,
    scale: float,
    /,
    *sizes: int,
) -> None: ...
