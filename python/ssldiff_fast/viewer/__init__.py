# SPDX-License-Identifier: Apache-2.0
"""Looking at slides in a browser: deep-zoom tiles and a page, served on this machine only.

`library` fetches OpenSeadragon when the package is built, `image` opens what is viewed, `align`
finds what part of a reference an image was made after, `tiles` renders, `overlays` prepares mask
and cells, `app` answers requests, `server` listens. Nothing is imported here: the build loads
`library` before the package exists.
"""
