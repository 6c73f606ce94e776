"""What ColossalAI 0.5.0 needs to run on this torch and on this device.

``distributed()`` is the one door: it installs the accelerator object, the kernels and the
patches of this folder, starts the process group and takes it down again. No other room of
the package changes a library.
"""
