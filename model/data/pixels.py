"""Picture files as RGB pixels, in the frame that the annotations use."""

from pathlib import Path

from PIL import Image

from dsg.model.data.records import DataError
from dsg.model.network.pixels import SeveralFramesError, UnknownRangeError, as_stored, exif_orientation, upright_rgb


def read_picture(
    path: Path,
    size: tuple[int, int],  # (height, width) that the annotations say
) -> Image.Image:
    """A picture as 8-bit RGB of `size`; colours as the Predictor sees them, see `upright_rgb`.

    EXIF: COCO sizes mostly count the stored pixels, whatever the file's orientation tag says, but some
    tools write the size of the upright picture. So a picture whose stored size is `size` is taken as
    stored; one whose upright size is `size` is turned upright. (A tag that swaps no sides, such as 180
    degrees, is therefore never followed.)

    Raises:
        DataError: no such file, not a picture or a broken one, another size, several pages, or numbers
            without a known range (32-bit or float); one line that names the file.
    """
    try:
        with Image.open(path) as picture:
            orientation = exif_orientation(picture)
            upright = upright_rgb(picture)
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture; check the images directory") from None
    except (SeveralFramesError, UnknownRangeError) as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # decoders of broken files raise nearly anything
        raise DataError(f"{path}: cannot be decoded ({error}); replace or remove the picture") from None
    rgb = as_stored(upright, orientation)
    if size == (rgb.height, rgb.width):
        return rgb
    if size == (upright.height, upright.width):
        return upright
    raise DataError(
        f"{path}: is {rgb.height} x {rgb.width} (height x width), its annotations say "
        f"{size[0]} x {size[1]}; correct the size or give the picture that was annotated"
    )
