"""A picture holds the pixels it was given."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest

from attar.reporting.png import data_uri
from attar.runtime import DataError


def image(height: int = 3, width: int = 2, channels: int = 3) -> dict[str, Any]:
    pixels = bytes(range(height * width * channels))
    told = {"height": height, "width": width, "channels": channels}
    return told | {"pixels": base64.b64encode(pixels).decode()}


@pytest.mark.parametrize("channels", [1, 3])
def test_another_reader_sees_the_same_pixels(channels: int) -> None:
    reader = pytest.importorskip("PIL.Image")
    uri = data_uri(image(5, 4, channels))
    assert uri.startswith("data:image/png;base64,")
    with reader.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as found:
        assert found.size == (4, 5)
        assert found.mode == {1: "L", 3: "RGB"}[channels]
        assert found.tobytes() == bytes(range(5 * 4 * channels))


@pytest.mark.parametrize(
    "changes",
    [
        {"pixels": "AAAA"},
        {"pixels": "javascript:alert(1)"},
        {"pixels": '"><script>'},
        {"channels": 2},
        {"height": 0},
        {"width": -2, "height": -3},
        {"width": 10**6},
        {"height": True},
        {"width": "2"},
    ],
)
def test_what_is_no_image_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="an image of"):
        data_uri(image() | changes)
