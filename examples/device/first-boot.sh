#!/bin/sh
# Makes and proves the engines of a bundle on the device that will run them. Safe to run at every boot: engines that
# are there and fit are kept, so that only the first boot and the first one after an update take minutes.
#
# EDGEWRIGHT_BUNDLE  the bundle, a folder or a .edgewright file
# EDGEWRIGHT_KEY     the public key that it must be signed with
# EDGEWRIGHT_CACHE   where engines are kept; writable by this user alone
# EDGEWRIGHT         the command, if it is not on the PATH
set -eu

: "${EDGEWRIGHT_BUNDLE:?set it to the bundle}" "${EDGEWRIGHT_KEY:?set it to the public key}"
command=${EDGEWRIGHT:-edgewright}

"$command" doctor
exec "$command" build "$EDGEWRIGHT_BUNDLE" --require-signature "$EDGEWRIGHT_KEY"
