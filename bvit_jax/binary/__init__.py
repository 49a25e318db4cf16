"""What one bit is: estimators, quantised weights and probabilities, exact products. Pure functions of arrays.

This room knows no Flax and imports no other room. What each function does *at* its edges is part of the
numbers, and every row is tested:

======================  ==================================  ===========================================
function                forward at the edge                 gradient at the edge
======================  ==================================  ===========================================
PARABOLA                sign(0) = 0                         2 at 0, 0 at -1 and at 1, 0 at ±inf
CLIP                    sign(0) = 0                         1 on the closed interval |x| <= 1
TANH                    sign(0) = 0                         2 at 0, 0 at ±inf, not 0 elsewhere
any estimator's .bit    sign(0) = sign(-0) = 1              as that of the estimator
DENSE                   a weight at its row mean -> 0       1 on the closed interval |W - mean| <= 1
CONV                    sign(0) = 0                         1 on the closed interval |W| <= 1
RECU                    a weight at its row mean -> 0       1 up to the quantile of |t|
BITS                    sign(0) = sign(-0) = 1              1 on the closed interval |W| <= 1
quantize_weight, 2      |w| at the threshold -> 0           1 on the open interval (-clip, clip)
quantize_weight, 3-8    half to even                        1 on the open interval (-clip, clip)
quantize_probs          p/scale = 0.5 -> 0 (half to even)   1 on the closed interval 0 <= p/scale <= 1
level_codes             half to even                        1 where the rounded value is 0 to 3
gsb_probabilities       p/scale = 0.5 -> 0 (half to even)   scale: 1 - p/scale on 0 <= p/scale <= 1, else 1
above                   the floor itself                    only what raises the value
zero_point_codes        sign(0) = 0; round half to even     1 on the closed interval |u| <= 1
first_values            a minimum at -1e-5 is unsigned      none
clip_output             none                                1 on the closed interval |x| <= 10
======================  ==================================  ===========================================

Another estimator is one value, `Estimator(slope)`, and an entry of `ESTIMATORS` makes it a value of
``config.model.estimator``. In your own functions, ``straight_through(estimator)(x)`` is its sign.
"""

from bvit_jax.binary.codes import Codes
from bvit_jax.binary.convolutions import binary_convolution
from bvit_jax.binary.estimators import CLIP, ESTIMATORS, PARABOLA, TANH, Estimator, straight_through
from bvit_jax.binary.gsb import gsb_probabilities
from bvit_jax.binary.levels import quantize_levels
from bvit_jax.binary.multibit import quantize_weight
from bvit_jax.binary.probabilities import above, quantize_probs
from bvit_jax.binary.products import (
    ProductConfig,
    binary_context,
    binary_product,
    binary_scores,
    code_product,
    real_product,
)
from bvit_jax.binary.weights import BITS, CONV, DENSE, RECU, WeightRule, binarize, weight_scale

__all__ = [
    "BITS",
    "CLIP",
    "CONV",
    "DENSE",
    "ESTIMATORS",
    "PARABOLA",
    "RECU",
    "TANH",
    "Codes",
    "Estimator",
    "ProductConfig",
    "WeightRule",
    "above",
    "binarize",
    "binary_context",
    "binary_convolution",
    "binary_product",
    "binary_scores",
    "code_product",
    "gsb_probabilities",
    "quantize_levels",
    "quantize_probs",
    "quantize_weight",
    "real_product",
    "straight_through",
    "weight_scale",
]
