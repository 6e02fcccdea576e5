"""Multipart bodies: every part comes out as it went in, also where it looks like a boundary that is none."""

from hypothesis import assume, given
from hypothesis import strategies as st

from dsg.service.body import split_body

TYPE = "multipart/form-data; boundary=b"
HEAD = b'--b\r\nContent-Disposition: form-data; name="image"; filename="%d.jpg"\r\n\r\n'
# A file of these is cut into pieces wherever the parser takes it for its end at first.
NEARLY = st.lists(st.sampled_from([b"\r\n--b-", b"\r\n--bX", b"\r\n-", b"\r", b"\n--b", b"a", b"\0"]), max_size=30)


@given(st.lists(NEARLY.map(b"".join) | st.binary(max_size=300), min_size=1, max_size=4))
def test_parts_come_out_as_they_went_in(files: list[bytes]) -> None:
    # A line that is the boundary ends a part, by the format's own rule: no sender puts it into one.
    assume(not any(end in b"\r\n" + file + b"\r\n" for file in files for end in (b"\r\n--b\r\n", b"\r\n--b--")))
    parts = [HEAD % number + file + b"\r\n" for number, file in enumerate(files)]
    uploads = split_body(TYPE, b"".join(parts) + b"--b--\r\n", max_pictures=4)
    assert [(one.name, one.data) for one in uploads] == [(f"{number}.jpg", file) for number, file in enumerate(files)]
