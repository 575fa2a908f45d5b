# SPDX-License-Identifier: Apache-2.0
"""Machine code as bytes, assembled from the .S file beside this module (a test assembles it again)."""

EACH_PAGE = bytes.fromhex(
    "53554154415541564889fb4889f54989d44989cd4d89c64d85e4742a4889efbe001000004c89eaff"
    "d3480fca480fc8498916498946084881c5001000004983c61049ffccebd1415e415d415c5d5bc3"
)
