// The Python module jax_natten._cuda: the FFI handlers as capsules, and the FFI version that they
// were built with.
#include <nanobind/nanobind.h>

#include "cpu/registrations.h"

NB_MODULE(_cuda, m) { jax_natten::define_registrations(m); }
