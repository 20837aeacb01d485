"""The kernels of Hopper cards, in CUDA C++, shipped as the PTX that it compiles to. Importing this
package loads nothing: its modules load Triton, as those of hybridk2.model.triton do."""
