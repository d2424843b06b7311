// Which of the tables of kernels serves this process. Not for sources that are compiled once per instruction set.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace hsv {

// The tables that are built and that this machine can run, the best first.
std::vector<const Kernels*> usable_kernels();

// The best of them, or the one named by HSV_CPU_ISA. Throws std::runtime_error if that is none of them.
const Kernels& active_kernels();

}  // namespace hsv
