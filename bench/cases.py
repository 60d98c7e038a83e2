"""One table of shapes for tests and benches.

Small ones are chosen to break loops, big ones are real layers.
"""

from typing import NamedTuple

__all__ = ["ADAPTIVE", "AVG_POOL", "CONV", "ELEMENTWISE", "LOSS", "MATMUL", "MAX_POOL", "NORM",
           "BENCH_CONV", "BENCH_ELEMENTWISE", "BENCH_GROUP_NORM", "BENCH_LOSS", "BENCH_MATMUL",
           "BENCH_NORM", "BENCH_OTHER_NORM", "BENCH_POOL", "BENCH_ROW_NORM", "BENCH_SMALL_NORM",
           "BENCH_WEIGHT", "Conv", "Pool"]


class Conv(NamedTuple):
    """x (N, C, H, W), weight (O, C/groups, I, J)."""

    name: str
    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def settings(self):
        """The keywords of the convolution kernels."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation,
                "groups": self.groups}


CONV = [
    Conv("one pixel", (1, 1, 1, 1), (1, 1, 1, 1)),
    Conv("plain", (2, 3, 7, 6), (4, 3, 3, 3), padding=(1, 1)),
    Conv("uneven everything", (2, 4, 9, 8), (6, 2, 3, 2), (2, 1), (0, 1), (1, 2), 2),
    Conv("primes, wider than a tile", (3, 37, 11, 13), (41, 37, 3, 3), padding=(1, 1)),
    Conv("stride 2", (3, 5, 9, 11), (17, 5, 3, 3), (2, 2), (1, 1)),
    Conv("stride skips pixels", (2, 3, 8, 8), (4, 3, 2, 2), (3, 3)),
    Conv("1x1", (3, 8, 5, 5), (16, 8, 1, 1)),
    Conv("1x1 stride 2, groups", (3, 8, 5, 5), (16, 4, 1, 1), (2, 2), groups=2),
    Conv("padding wider than kernel", (2, 3, 4, 4), (5, 3, 1, 2), padding=(2, 3)),
    Conv("depthwise", (2, 6, 7, 7), (6, 1, 3, 3), padding=(1, 1), groups=6),
    Conv("depthwise, stride 2, dilated", (2, 6, 9, 8), (6, 1, 3, 3), (2, 2), (2, 2), (2, 2), 6),
    Conv("depthwise, two per channel", (2, 4, 5, 5), (8, 1, 3, 3), padding=(1, 1), groups=4),
    Conv("kernel as large as input", (4, 6, 5, 5), (7, 6, 5, 5)),
    Conv("no images", (0, 8, 5, 5), (4, 8, 3, 3), padding=(1, 1)),
    Conv("no outputs", (2, 3, 5, 5), (0, 3, 3, 3)),
]


def _layer(net, batch, channels, filters, size, k=3, stride=1, *, depthwise=False):
    """A layer of a network, padded by half its kernel; named by what it does."""
    name = f"{net} {channels}->{filters} {k}x{k}{f'/{stride}' if stride > 1 else ''} @{size}"
    return Conv(name + (" depthwise" if depthwise else ""), (batch, channels, size, size),
                (filters, 1 if depthwise else channels, k, k), (stride, stride),
                (k // 2, k // 2), groups=channels if depthwise else 1)


# every distinct layer: He et al. 2016 at CIFAR's and at ImageNet's size, the latter with few images
# so that a call takes milliseconds
RESNET20 = [
    _layer("resnet20", 128, 3, 16, 32), _layer("resnet20", 128, 16, 16, 32),
    _layer("resnet20", 128, 16, 32, 32, stride=2), _layer("resnet20", 128, 32, 32, 16),
    _layer("resnet20", 128, 32, 64, 16, stride=2), _layer("resnet20", 128, 64, 64, 8),
]
RESNET18 = [_layer("resnet18", 8, 3, 64, 224, 7, 2), _layer("resnet18", 8, 64, 64, 56)]
for _c, _size in ((64, 56), (128, 28), (256, 14)):
    RESNET18 += [_layer("resnet18", 8, _c, 2 * _c, _size, stride=2),
                 _layer("resnet18", 8, _c, 2 * _c, _size, 1, 2),
                 _layer("resnet18", 8, 2 * _c, 2 * _c, _size // 2)]
# Howard et al. 2017: a depthwise and a 1 x 1 layer, again and again; then one block of Sandler et
# al. 2018 (v2), which widens, filters and narrows
MOBILENET = [_layer("mobilenet", 8, 3, 32, 224, stride=2)]
for _c, _o, _size, _stride in ((32, 64, 112, 1), (64, 128, 112, 2), (128, 128, 56, 1),
                               (128, 256, 56, 2), (256, 256, 28, 1), (256, 512, 28, 2),
                               (512, 512, 14, 1), (512, 1024, 14, 2), (1024, 1024, 7, 1)):
    MOBILENET += [_layer("mobilenet", 8, _c, _c, _size, stride=_stride, depthwise=True),
                  _layer("mobilenet", 8, _c, _o, _size // _stride, 1)]
MOBILENET += [_layer("mobilenet2", 8, 24, 144, 56, 1),
              _layer("mobilenet2", 8, 144, 144, 56, depthwise=True),
              _layer("mobilenet2", 8, 144, 24, 56, 1)]
BENCH_CONV = [
    *RESNET20, *RESNET18, *MOBILENET,
    Conv("lenet 1->6 5x5 @28", (64, 1, 28, 28), (6, 1, 5, 5), padding=(2, 2)),
    Conv("lenet 6->16 5x5 @14", (64, 6, 14, 14), (16, 6, 5, 5)),
]


class Pool(NamedTuple):
    """x (N, C, H, W) and windows."""

    name: str
    x: tuple[int, int, int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    @property
    def settings(self):
        """The keywords of average pooling; max pooling takes dilation too."""
        return {"kernel_size": self.kernel_size, "stride": self.stride, "padding": self.padding,
                "ceil_mode": self.ceil_mode}


MAX_POOL = [
    Pool("one pixel", (1, 1, 1, 1), (1, 1), (1, 1)),
    Pool("plain", (2, 3, 8, 6), (2, 2), (2, 2)),
    Pool("overlap, odd", (2, 37, 9, 7), (3, 3), (2, 2), (1, 1)),
    Pool("uneven, partial last window", (2, 3, 9, 8), (3, 2), (2, 3), (1, 1), ceil_mode=True),
    Pool("dilated", (3, 5, 9, 8), (3, 2), (2, 1), (1, 1), (2, 2), True),
    Pool("no images", (0, 3, 9, 8), (3, 2), (2, 1), (1, 1)),
    Pool("no channels", (2, 0, 4, 4), (2, 2), (2, 2)),
]
AVG_POOL = [case for case in MAX_POOL if case.dilation == (1, 1)]
# (shape, output size)
ADAPTIVE = [((2, 3, 7, 5), (1, 1)), ((2, 37, 7, 5), (3, 2)), ((2, 3, 4, 4), (7, 9)),
            ((0, 3, 4, 4), (2, 2))]
BENCH_POOL = [
    Pool("lenet", (64, 6, 28, 28), (2, 2), (2, 2)),
    Pool("resnet18", (8, 64, 112, 112), (3, 3), (2, 2), (1, 1)),
]

# (N, C, *S): rows × channels and planes, below and above a tile and the lanes; one channel; nothing
NORM = [(1, 1), (60, 100), (7, 3), (1, 17), (2, 1500), (1031, 37), (5, 3, 4, 4), (5, 3, 9, 9),
        (3, 5, 1, 1), (3, 1, 5, 5), (2, 3, 131), (130, 2, 3, 17, 5), (0, 3), (4, 0), (2, 3, 0, 5)]
# training at 8 MB and more; ResNet-20's later stages, which a cache holds; at most 64 KB
BENCH_NORM = [(128, 16, 32, 32), (128, 64, 32, 32), (32, 256, 28, 28), (8, 64, 112, 112),
              (128, 512, 7, 7), (4096, 1024), (128, 32, 16, 16), (128, 64, 8, 8)]
# (N, C, H, W), groups; one per channel is instance norm
BENCH_GROUP_NORM = [((32, 64, 56, 56), 32), ((8, 256, 14, 14), 32), ((128, 64, 4, 4), 8),
                    ((64, 64, 8, 8), 64), ((2, 32, 128, 128), 32)]
BENCH_ROW_NORM = [(4096, 768), (512, 4096), (64, 100)]          # layer and RMS norm
# images, and a weight, for the norms that PyTorch does not have
BENCH_OTHER_NORM, BENCH_WEIGHT = (32, 64, 28, 28), (256, 256, 3, 3)
BENCH_SMALL_NORM = [(60, 100), (128, 128), (16, 16, 8, 8), (4, 64, 8, 8)]

# (shape, axis)
LOSS = [((1, 1), 1), ((7, 10), -1), ((7, 10), 0), ((2, 1500), 1), ((70, 65), 1), ((3, 5, 4, 3), 1),
        ((3, 5, 4, 3), 2), ((5,), 0), ((0, 4), 1), ((3, 0), 0)]
BENCH_LOSS = [(128, 10), (64, 1000), (512, 32000)]

# (M, K, N)
MATMUL = [(1, 1, 1), (3, 5, 7), (13, 1, 17), (1, 64, 1), (33, 129, 65), (0, 3, 4), (3, 0, 4),
          (2, 4, 0)]
BENCH_MATMUL = [*((n, n, n) for n in (64, 96, 128, 256, 512, 1024, 2048)),
                (60, 784, 100), (128, 64, 10), (4096, 512, 64)]

ELEMENTWISE = [((), ()), ((1,), (1,)), ((7,), (7,)), ((3, 1), (1, 5)), ((2, 3, 4), (4,)),
               ((0, 3), (1, 3)), ((129, 33), (129, 33)), ((5, 1, 7), (3, 1))]
BENCH_ELEMENTWISE = [(60, 100), (256, 1024), (6144, 1024)]     # 24 KB, 1 MB, 25 MB
