"""Every case that does not pass, with its reason. tests/test_onnx.py holds that this is exact."""

from fnmatch import fnmatchcase

__all__ = ["ABSENT", "DTYPE", "REASONS", "counts", "expected"]

# Operators that nbgrad does not have, nor a line or a few on Tensors make up, and how many cases
# use each (of several that one case uses, the first in alphabetical order counts).
ABSENT = {
    "attention, recurrence": """
        Attention 93, CausalConvWithState 13, FlexAttention 11, GRU 6, LSTM 6, LinearAttention 14,
        RNN 6, RotaryEmbedding 8, TensorScatter 3""",
    "quantization": """
        ConvInteger 2, DequantizeLinear 14, DynamicQuantizeLinear 3, MatMulInteger 1,
        QLinearConv 1, QLinearMatMul 8, QuantizeLinear 16""",
    "images": """
        AffineGrid 4, CenterCropPad 6, Col2Im 5, DeformConv 4, GridSample 18, ImageDecoder 9,
        MaxUnpool 2, NonMaxSuppression 10, Resize 39, RoiAlign 3, Upsample 1""",
    "functions": """
        Acos 2, Acosh 2, Asin 2, Asinh 2, Atan 2, Atanh 2, BitCast 10, BitShift 28, CumProd 9,
        Det 2, Einsum 9, RandomUniformLike 3, ReverseSequence 3, Unique 7""",
    "signals": """
        BlackmanWindow 2, DFT 10, HammingWindow 2, HannWindow 2, MelWeightMatrix 1, STFT 2""",
    "strings, sequences, optionals": """
        OptionalGetElement 4, OptionalHasElement 7, RegexFullMatch 3, SequenceInsert 2,
        SequenceMap 6, SplitToSequence 3, StringConcat 5, StringNormalizer 6, StringSplit 6,
        TfIdfVectorizer 7""",
    "control flow": "If 7, Loop 13, Scan 18",
    "trees, labels": "ArrayFeatureExtractor 1, Binarizer 1, LabelEncoder 4, TreeEnsemble 2",
    "optimizers": "Adagrad 2",
}

# Of the other operators: reason, and the names of the cases; * stands for anything.
DTYPE = "a type that the adapter does not run"
REASONS = {
    DTYPE: """
        cast*FLOAT16* cast*FLOAT8* cast*FLOAT4* cast*INT4* cast*INT2* *fp16* *bf16* *float16*
        attention_24_qk_matmul_output_mode3_softmax_precision_expanded equal_string*
        identity_sequence identity_opt""",
    "windows over three dims": """
        averagepool_3d_default averagepool_3d_dilations_* convtranspose_3d lppool_3d_default
        maxpool_3d_*""",
    "dilation of average pooling (PyTorch has none either)": """
        averagepool_2d_dilations lppool_2d_dilations""",
    "the random numbers of NumPy's RandomState": """
        bernoulli bernoulli_double bernoulli_seed training_dropout training_dropout_default
        training_dropout_default_mask training_dropout_mask""",
    "scatter with a product or an extreme": """
        scatter_elements_with_reduction_* scatternd_m*""",
    "the largest of nothing raises, as in PyTorch": "reduce_max_empty_set* reduce_min_empty_set",
    "the vector has four digits (it passes at ONNX's own rtol of 1e-3)": """
        averagepool_2d_ceil_last_window_starts_on_pad""",
}


def counts():
    """{operator: cases} of ABSENT."""
    items = ", ".join(ABSENT.values()).split(",")
    return {name: int(number) for name, number in (item.split() for item in items)}


def expected(cases):
    """{name: reason} of the cases whose operators are all there and that are not to pass."""
    patterns = [(pattern, reason) for reason, names in REASONS.items() for pattern in names.split()]
    return {name: reason for name in cases for pattern, reason in patterns
            if fnmatchcase(name, pattern)}
