#!/bin/sh
# pip into the image's virtual environment, through the CA bundle of the build secret where one is given.
set -eu
if [ -s /run/secrets/ca_bundle ]; then
    export PIP_CERT=/run/secrets/ca_bundle
fi
exec pip "${PIP_COMMAND:-install}" --disable-pip-version-check "$@"
