"""Puts the tables and figures of finished runs into README.md and the pages of docs/, where these have places for them.

    python -m lab.fill_in runs/toy      # after make demo-sweep: make readme

A place is `<!-- TABLE of FOLDER -->`, a line of its own, up to `<!-- end -->`; TABLE stands before each table of the
folder's results.md. Figures are copied to docs/figures/FOLDER-NAME.png if a page shows them. Nothing is written if a
page asks for something that is not there.
"""

import re
import shutil
from pathlib import Path

from support.command import bare_flags, launch
from support.errors import UserError
from support.files import HOME, write_whole


def fill_in(folder, root=HOME):
    """folder: of runs, with results.md and figures; root: of README.md and docs/."""
    results = (folder / "results.md").read_text(encoding="utf-8")
    tables = dict(re.findall(r"<!-- (\S+) -->\n(.*?)<!-- end -->", results, re.DOTALL))
    name, texts, shown = re.escape(folder.name), {}, set()
    place = rf"^(<!-- (\S+) of {name} -->\n).*?(?:^<!-- (.*?) -->$|\Z)"

    def newest(found):
        if found[2] not in tables:
            raise UserError(f"{page} has a place for a table {found[2]}, which {folder}/results.md has not")
        if found[3] != "end":
            raise UserError(f"{page} has a place for a table {found[2]}, but no <!-- end --> after it")
        return f"{found[1]}\n{tables[found[2]]}\n<!-- end -->"

    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        figures = (root / "docs" / "figures").relative_to(page.parent)  # as this page links them
        for figure in re.findall(rf"\({figures}/{name}-(\S+?\.png)\)", text):
            if not (folder / figure).exists():
                raise UserError(f"{page} shows a figure {figure}, for which {folder} has no runs")
            shown.add(figure)
        texts[page] = text, re.sub(place, newest, text, flags=re.DOTALL | re.MULTILINE)
    for page, (old, new) in texts.items():
        if new != old:
            write_whole(page, new)
    for figure in shown:
        shutil.copyfile(folder / figure, root / "docs" / "figures" / f"{folder.name}-{figure}")


def main(argv=None):
    flags = bare_flags(__doc__)
    flags.add_argument("folder", type=Path, help="the folder that holds the runs")
    fill_in(flags.parse_args(argv).folder)


if __name__ == "__main__":
    launch(main)
