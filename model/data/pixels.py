"""Picture files as RGB pixels, in the frame that the annotations use."""

from pathlib import Path

import numpy as np
from PIL import Image

from dsg.model.data.records import DataError

_ORIENTATION = 0x0112
_UPRIGHT = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, for the EXIF orientations that swap height and width."""


def read_picture(
    path: Path,
    size: tuple[int, int],  # (height, width) that the annotations say
) -> Image.Image:
    """A picture as 8-bit RGB of `size`.

    EXIF: COCO sizes mostly count the stored pixels, whatever the file's orientation tag says, but some
    tools write the size of the upright picture. So a picture whose stored size is `size` is taken as
    stored; one whose upright size is `size` is turned upright. (A tag that swaps no sides, such as 180
    degrees, is therefore never followed.)

    Colours: greyscale, palette and CMYK are converted, transparency is composed on white, 16-bit greyscale
    is scaled by its whole range (65535 becomes 255).

    Raises:
        DataError: no such file, not a picture or a broken one, another size, several pages, or numbers
            without a known range (32-bit or float); one line that names the file.
    """
    try:
        with Image.open(path) as picture:
            # Phones write photos as MPO: the first frame is the photo, the others are previews of it.
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":
                raise DataError(f"{path}: has {frames} pages or frames; give one picture per file")
            if picture.mode == "F" or (picture.mode == "I" and picture.format != "PNG"):
                raise DataError(f"{path}: its numbers have no known range; convert it to 8 or 16 bits")
            orientation = picture.getexif().get(_ORIENTATION, 1)
            picture.load()
            stored = (picture.height, picture.width)
            turned = stored[::-1] if orientation in _UPRIGHT else stored
            if size not in (stored, turned):
                raise DataError(
                    f"{path}: is {stored[0]} x {stored[1]} (height x width), its annotations say "
                    f"{size[0]} x {size[1]}; correct the size or give the picture that was annotated"
                )
            rgb = _to_rgb(picture)
            return rgb if size == stored else rgb.transpose(_UPRIGHT[orientation])
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture; check the images directory") from None
    except Exception as error:  # decoders of broken files raise nearly anything
        raise DataError(f"{path}: cannot be decoded ({error}); replace or remove the picture") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # Pillow's own conversion clips at 255. Older versions open 16-bit PNG as mode I.
        values = np.asarray(picture).astype(np.uint32)
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return picture.convert("RGB")
