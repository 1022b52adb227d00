//! The tests of a part of the extension, which has no test binary of its own: it links against the Python that loads it.

#[path = "../extension/src/maps.rs"]
#[allow(dead_code)]
mod maps;
