from __future__ import annotations

import numpy as np
import pytest
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from ulysses_monitor.common.tfrecord import masked_crc32c


@pytest.mark.parametrize("length", [0, 1, 3, 4, 8, 511, 512, 513, 5000])
def test_the_checksum_equals_tensorboards(length: int) -> None:
    data = np.random.default_rng(length).bytes(length)
    assert masked_crc32c(data) == pywrap_tensorflow.masked_crc32c(data)
