#!/bin/sh
# Installs the wheel that lies in the folder SOURCE, beside constraints.txt, into the new folder TARGET:
#     install.sh TARGET SOURCE
# without what only draws figures, and without pip: a server needs neither.
set -eu
target=$1
source=$2
python3 -m venv "$target"
"$target/bin/pip" install --disable-pip-version-check -qq -c "$source/constraints.txt" "$source"/*.whl
"$target/bin/pip" uninstall -qq -y matplotlib fonttools kiwisolver contourpy cycler pyparsing python-dateutil six
"$target/bin/pip" uninstall -qq -y setuptools pip
find "$target" -type d -name tests -path '*/site-packages/*' -prune -exec rm -rf {} +
