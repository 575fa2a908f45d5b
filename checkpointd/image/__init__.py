# SPDX-License-Identifier: Apache-2.0
"""Images and the store that holds them.  Runs on any machine: knows nothing of kernels, processes or gRPC.

::

    store = Store.open(path, create=True)              # store.py: names, locks, removal
    with store.begin(parent=store.load(...)) as b:     # builder.py: pages in, one commit
        b.add_pages(PRIVATE_OBJECT, pages, data)       # zero, same as the parent's, or written
        b.add_read(PRIVATE_OBJECT, pages, read)        # the same, read a block at a time
        b.inherit(PRIVATE_OBJECT, clean_pages)         # unread, as the parent has them
        info = b.commit(meta={...}, state=b"...")      # durable from here on
    image = store.load(store.resolve("latest"))        # reader.py: read, stream, digests
    for obj, pages, data in image.stream(): ...        # stream.py: all but zero pages, in disk order
    image.visit(write)                                 # the same in parts, on the threads that read them

files.py I/O and locks; layout.py the directory; format.py structures and limits; digest.py page digests, xxh3.py and
blobs/ how they are computed; index.py extents; pack.py page data; delta.py pages stored as differences; imagefile.py
one image's bytes; columns.py and writers.py the index and the packs of an image in the making; consolidate.py which
old blocks it copies; stream.py and whole.py reading all of an image; verify.py, portable.py (export, import), refs.py
(names), info.py (what `ls` shows).

The format is docs/image-format.md.
"""
