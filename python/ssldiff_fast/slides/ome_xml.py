# SPDX-License-Identifier: Apache-2.0
"""OME-XML of an image, with its recipe as an annotation."""

from __future__ import annotations

import uuid

from .raster import Raster, recipe_json

NAMESPACE = "ssldiff_fast/recipe"


def ome_xml(raster: Raster, description: str) -> str:
    """The text of an OME-TIFF's first ImageDescription, ASCII; the same for the same image."""
    import tifffile

    from ssldiff_fast import __version__

    # A random identifier would make two equal runs differ.
    identity = uuid.uuid5(uuid.NAMESPACE_OID, f"{description} {raster}")
    xml = tifffile.OmeXml(Creator=f"ssldiff_fast {__version__}", UUID=str(identity))
    shape = (int(raster.height), int(raster.width), raster.bands)
    xml.addimage(
        "uint8",
        shape,
        (1, 1, 1, *shape),
        axes="YXS",
        Name="synthetic image",
        Description=description.split("\n", 1)[0],
        PhysicalSizeX=raster.mpp,  # in um, OME's default
        PhysicalSizeY=raster.mpp,
        CommentAnnotation={
            "Value": recipe_json(description),
            "Namespace": NAMESPACE,
            "Description": "The recipe of this synthetic image, as JSON.",
        },
    )
    return xml.tostring(declaration=True).encode("ascii", "xmlcharrefreplace").decode("ascii")
