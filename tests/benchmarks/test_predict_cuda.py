"""The counted table stands in the documents as it is counted."""

from pathlib import Path

import predict_cuda

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def test_the_committed_table_is_the_counted_one():
    text = DOCUMENT.read_text()
    for line in predict_cuda.rows():
        assert line in text
