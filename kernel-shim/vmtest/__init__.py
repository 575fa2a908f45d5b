# SPDX-License-Identifier: Apache-2.0
"""A small laboratory: build the kernels this project needs and run one command inside one of them.

Plain Python, standard library only, run from a checkout as ``python -m vmtest`` with ``kernel-shim`` on
``PYTHONPATH``. It is a developer's tool and is not shipped in the wheel.

* ``kbuild`` makes a kernel image out of Debian's source package, our patches and our configuration, once.
* ``vm`` boots an image under QEMU (emulation only), with the host's root below a throw-away overlay.
"""
