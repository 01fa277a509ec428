"""How far two computations of the same numbers may be apart, in one table; each is a bound on the largest error."""

OUTPUT = 2e-5  # float32 outputs of order 1 (about 5e-7 is usual), times the largest value where that exceeds 1
STAGE = 2e-5  # the same for what the model computes on the way
GRADIENT = 1e-4  # in units of each tensor's largest entry: sums over all pixels, so more rounding than the output
LOSS = 1e-5  # a float32 mean over all entries of order 1
DOUBLE_RMS = 1.5  # RMS distance to the float64 output, in units of the reference's own float32 distance
ENCODER = 2e-5  # JAX against PyTorch on an encoder's features, times the largest feature where that exceeds 1
BACKBONE = 2e-5  # Flax encoders against timm, in units of the largest feature (about 1e-6 is usual)
TRAINED = 1e-5  # the same for features and logits of trained weights on photographs (about 1e-6 is usual)
UPSAMPLERS = {"jafar": 2e-5, "featup": 2e-5, "loftup": 2e-5, "naf": 5e-5}  # outputs of the others; NAF's reach 7
CANCELLING = 1e-3  # gradients of scalars that are sums with cancellation, in units of their size


def largest(values) -> float:
    """The unit of errors in `values`: their largest magnitude, but at least 1."""
    return max(1.0, float(abs(values).max()))
