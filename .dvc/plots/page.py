# ruff: noqa: INP001
"""Write `page.html`, the page of `dvc plots`, with Vega inside: it opens without a network.

In a folder: `npm pack vega@5.33.1 vega-lite@5.23.0 vega-embed@6.29.0`, `python .dvc/plots/page.py FOLDER`.
DVC wants a template that is there before any command of ours has run, hence a file in Git; packed, it has
less than half the bytes of the scripts. The page asks no server for anything, and its policy allows it none.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import sys
import tarfile
from pathlib import Path

# Of each script, in the order in which they are loaded: package, version and SHA-256, as npm has them.
SCRIPTS = (
    ("vega", "5.33.1", "463f3db6a40b20e9747b4ed38f37ed0add508838f9141b1cf8366784b07b30c8"),
    ("vega-lite", "5.23.0", "58c27358e26f2d319cf62f45bc17a4c8362f08645001df2ec8d341eee4097c7f"),
    ("vega-embed", "6.29.0", "12d02acfbe3ec59ef9a37dd4822a2e04e2961b5bbb671bbe661d2221715b99da"),
)
BETWEEN = b"\n/* the next script */\n"
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline';
 script-src 'unsafe-inline' 'unsafe-eval'">
<title>Plots of StreetVision</title>
{refresh_tag}
<style>
body { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1.5em; font-family: sans-serif; }
body > div { border-width: 0 !important; max-width: 100%; overflow-x: auto; }
img { max-width: 600px; }
</style>
<!-- @names (BSD-3-Clause, https://vega.github.io), gzip in base64, by .dvc/plots/page.py -->
<script id="vega" type="text/plain">@packed</script>
<script>
// DVC calls this while the page is read, the scripts are there a moment later; what has nothing to draw goes.
// Only errors are told: DVC's own templates leave empty properties, of which Vega warns.
const unpacked = (async () => {
  const packed = atob(document.getElementById("vega").textContent);
  const blob = new Blob([Uint8Array.from(packed, (letter) => letter.charCodeAt(0))]);
  const stream = blob.stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
})();
let vegaEmbed = async (place, spec) => {
  if (Object.keys(spec).length === 0) return document.querySelector(place).remove();
  await unpacked;
  return self.vegaEmbed(place, spec, { renderer: "svg", logLevel: 1 });
};
</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def main(folder: Path) -> None:
    """Write the page with the scripts of the packages in `folder`; each must have its SHA-256."""
    texts = []
    for name, version, digest in SCRIPTS:
        with tarfile.open(folder / f"{name}-{version}.tgz") as package:
            member = package.extractfile(f"package/build/{name}.min.js")
            data = member.read() if member else b""
        if hashlib.sha256(data).hexdigest() != digest:
            sys.exit(f"{name} {version} is not what it was")
        texts.append(data)
    packed = base64.b64encode(gzip.compress(BETWEEN.join(texts), 9, mtime=0)).decode()
    names = ", ".join(f"{name} {version}" for name, version, _ in SCRIPTS)
    page = PAGE.replace("@names", names).replace("@packed", packed)
    Path(__file__).with_suffix(".html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
