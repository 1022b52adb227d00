//! The functions of `runtime.py`, called from Rust.

use std::cell::{Cell, OnceCell};
use std::ffi::{CStr, CString, c_char};
use std::rc::Rc;

use pyo3::exceptions::PySystemExit;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use sock_zygote_protocol::LeafExtras;

/// `runtime.py`, compiled.
pub struct Runtime {
    module: Py<PyModule>,
    /// The generators that a leaf seeds, once all that are there are of the known kind.
    generators: OnceCell<Rc<[Twister]>>,
    /// Somebody may have used them since.
    is_touched: Cell<bool>,
}

/// Where a Mersenne twister has its state. Only numbers: what is there lives as long as the process.
struct Twister {
    words: usize,
    position: usize,
}

/// What a person is told when Python code failed.
pub struct Explained {
    /// One line, with file and line number.
    pub line: String,
    /// The traceback.
    pub traceback: String,
}

/// What a handler answered.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// Of the state of a Mersenne twister.
const WORDS: u16 = 624;

const SOURCE: &CStr =
    match CStr::from_bytes_with_nul(concat!(include_str!("runtime.py"), "\0").as_bytes()) {
        Ok(source) => source,
        Err(_) => panic!("runtime.py holds a NUL"),
    };

impl Runtime {
    pub fn load(py: Python<'_>) -> PyResult<Runtime> {
        let module = PyModule::from_code(py, SOURCE, c"<sock>", c"sock_runtime")?;
        Ok(Runtime {
            module: module.unbind(),
            generators: OnceCell::new(),
            is_touched: Cell::new(false),
        })
    }

    pub fn clone_ref(&self, py: Python<'_>) -> Runtime {
        Runtime {
            module: self.module.clone_ref(py),
            generators: self.generators.clone(),
            is_touched: self.is_touched.clone(),
        }
    }

    /// For a child that is to become a zygote itself: what was found of the parent is looked for anew.
    pub fn renewed(&self, py: Python<'_>) -> Runtime {
        Runtime {
            module: self.module.clone_ref(py),
            generators: OnceCell::new(),
            is_touched: Cell::new(false),
        }
    }

    fn function<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        self.module.bind(py).getattr(name)
    }

    pub fn become_zygote(
        &self,
        py: Python<'_>,
        path: &[String],
        accepts_threads: bool,
    ) -> PyResult<()> {
        self.function(py, "become_zygote")?
            .call1((PyList::new(py, path)?, accepts_threads))
            .map(drop)
    }

    /// In a child of a zygote that is to become one. Yields whether hooks are kept still: see `_keep_hooks`.
    pub fn descend(&self, py: Python<'_>, env: &[(String, String)]) -> PyResult<bool> {
        let variables = variables(py, env)?;
        set_environment(env)?;
        self.function(py, "descend")?.call1((variables,))?.extract()
    }

    /// In a leaf, after what the interpreter itself does there.
    pub fn after_fork(&self, py: Python<'_>) -> PyResult<()> {
        let others_ran = self.function(py, "after_fork")?.call0()?.extract()?;
        self.is_touched.set(others_ran);
        Ok(())
    }

    pub fn try_out(&self, py: Python<'_>, warm_up: &str) -> PyResult<()> {
        self.function(py, "try_out")?.call1((warm_up,)).map(drop)
    }

    /// Yields what `gather` takes.
    pub fn watch<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.function(py, "watch")?.call0()
    }

    /// To be called when memory is fresh, on the C library's heap from the address `heap`.
    pub fn gather(&self, py: Python<'_>, ran: Bound<'_, PyAny>, heap: usize) -> PyResult<()> {
        self.function(py, "gather")?.call1((ran,))?;
        self.function(py, "refresh_arrays")?.call1((heap,))?;
        // Names that some import was the last to look for would be given back by the leaf that needs their place.
        // SAFETY: the GIL is held.
        unsafe { pyo3::ffi::PyType_ClearCache() };
        Ok(())
    }

    pub fn warm_up(&self, py: Python<'_>) -> PyResult<()> {
        self.function(py, "warm_up")?.call0().map(drop)
    }

    pub fn settle(&self, py: Python<'_>) -> PyResult<()> {
        self.function(py, "settle")?.call0()?;
        let found = self.function(py, "generators")?.call0()?;
        let found = found.extract::<Option<Vec<_>>>()?;
        if let Some(found) = found.and_then(|found| found.into_iter().map(twister).collect()) {
            let _ = self.generators.set(found);
        }
        Ok(())
    }

    /// In a spare. That it cannot is no reason to do without the spare.
    pub fn rehearse(&self, py: Python<'_>) {
        if let Err(error) = self.function(py, "rehearse").and_then(|f| f.call0()) {
            eprintln!(
                "sock: a spare could not be prepared: {}",
                self.explain(py, &error).line
            );
        }
    }

    pub fn freeze(&self, py: Python<'_>) -> PyResult<()> {
        self.function(py, "freeze")?.call0().map(drop)
    }

    pub fn threads_of_python(&self, py: Python<'_>) -> PyResult<String> {
        self.function(py, "threads_of_python")?.call0()?.extract()
    }

    /// What is left in the buffers of standard output would be written again by every child.
    pub fn flush(&self, py: Python<'_>) {
        // A closed or full standard output is no reason to stop.
        let _ = self.function(py, "flush").and_then(|f| f.call0());
    }

    pub fn enter(
        &self,
        py: Python<'_>,
        env: &[(String, String)],
        path: &[String],
        cwd: &str,
        handler: &str,
    ) -> PyResult<()> {
        let variables = variables(py, env)?;
        set_environment(env)?;
        self.function(py, "enter")?
            .call1((variables, PyList::new(py, path)?, cwd, handler))
            .map(drop)
    }

    /// New seeds for the generators that a fork has copied.
    pub fn reseed(&self, py: Python<'_>) -> PyResult<()> {
        self.function(py, "reseed")?.call0().map(drop)
    }

    /// The same, as long as nobody has used them since [`Runtime::settle`].
    pub fn reseed_untouched(&self, py: Python<'_>) -> PyResult<()> {
        let Some(generators) = self.generators.get().filter(|_| !self.is_touched.get()) else {
            return self.reseed(py);
        };
        for twister in generators.iter() {
            let size = usize::from(WORDS) * size_of::<u32>();
            // SAFETY: `settle` has found the words of a generator there, which lives as long as the process. The GIL is
            // held.
            let got = unsafe { libc::getrandom(twister.words as *mut libc::c_void, size, 0) };
            if usize::try_from(got) != Ok(size) {
                return self.reseed(py);
            }
            // SAFETY: likewise. Past the last word: the next number is of a new round.
            unsafe { (twister.position as *mut u32).write(WORDS.into()) };
        }
        Ok(())
    }

    pub fn allow_threads(&self, py: Python<'_>, count: u32) -> PyResult<()> {
        self.function(py, "allow_threads")?
            .call1((count,))
            .map(drop)
    }

    /// Yields the handler, and its module as it was compiled, if that is to be kept.
    pub fn load_handler(
        &self,
        py: Python<'_>,
        handler: &str,
        path: &[String],
        extras: &LeafExtras,
    ) -> PyResult<(Py<PyAny>, Vec<u8>)> {
        let compiled = PyBytes::new(py, &extras.compiled);
        let (handler, new): (Bound<'_, PyAny>, Bound<'_, PyBytes>) = self
            .function(py, "load")?
            .call1((
                handler,
                PyList::new(py, path)?,
                compiled,
                extras.keep_compiled,
            ))?
            .extract()?;
        Ok((handler.unbind(), new.as_bytes().to_vec()))
    }

    /// Never fails: what cannot be explained is shown as the exception shows itself.
    pub fn explain(&self, py: Python<'_>, error: &PyErr) -> Explained {
        let value = error.value(py);
        if let Some(traceback) = error.traceback(py) {
            // Before Python 3.12 an exception that has come out of a call does not hold it by itself.
            let _ = value.setattr("__traceback__", traceback);
        }
        let explained: PyResult<(String, String)> = self
            .function(py, "explain")
            .and_then(|f| f.call1((value,)))
            .and_then(|r| r.extract());
        match explained {
            Ok((line, traceback)) => Explained { line, traceback },
            Err(_) => Explained {
                line: error.to_string(),
                traceback: error.to_string(),
            },
        }
    }

    pub fn context<'py>(
        &self,
        py: Python<'py>,
        request_id: &str,
        about: (&str, &str, &str),
        timeout_seconds: u32,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (function, namespace, pod) = about;
        self.function(py, "Context")?
            .call1((request_id, function, namespace, pod, timeout_seconds))
    }

    /// Runs the handler. An error is either `SystemExit`, or a result that could not be taken apart.
    pub fn call(
        &self,
        py: Python<'_>,
        handler: &Py<PyAny>,
        event: Bound<'_, PyDict>,
        context: Bound<'_, PyAny>,
    ) -> PyResult<Answer> {
        let (status, headers, body): (u16, Vec<(String, String)>, Bound<'_, PyBytes>) = self
            .function(py, "call")?
            .call1((handler, event, context))?
            .extract()?;
        Ok(Answer {
            status,
            headers,
            body: body.as_bytes().to_vec(),
        })
    }

    /// The status that `SystemExit` asks for, as the interpreter would take it.
    pub fn exit_status(py: Python<'_>, error: &PyErr) -> Option<i32> {
        if !error.is_instance_of::<PySystemExit>(py) {
            return None;
        }
        let code = error.value(py).getattr("code").ok()?;
        if code.is_none() {
            Some(0)
        } else {
            Some(code.extract().unwrap_or(1))
        }
    }
}

/// Makes sure that the state lies where it is said to: address of the words and of the position, and what Python says is there.
fn twister((words, position, known, at): (usize, usize, Vec<u32>, u32)) -> Option<Twister> {
    if known.len() != usize::from(WORDS) || words == 0 || !words.is_multiple_of(align_of::<u32>()) {
        return None;
    }
    // SAFETY: `generators` of runtime.py looks at the kind and the size of the object first, so that so much can be read.
    let (found, found_at) = unsafe {
        (
            std::slice::from_raw_parts(words as *const u32, WORDS.into()),
            (position as *const u32).read(),
        )
    };
    (found == known && found_at == at).then_some(Twister { words, position })
}

/// An environment as `os.environ` keeps it.
fn variables<'py>(py: Python<'py>, env: &[(String, String)]) -> PyResult<Bound<'py, PyDict>> {
    let variables = PyDict::new(py);
    for (name, value) in env {
        variables.set_item(
            PyBytes::new(py, name.as_bytes()),
            PyBytes::new(py, value.as_bytes()),
        )?;
    }
    Ok(variables)
}

unsafe extern "C" {
    static mut environ: *mut *mut c_char;
}

/// Gives the C library these variables and no others (environ(7)), by one list in place of a call for each.
fn set_environment(env: &[(String, String)]) -> PyResult<()> {
    let mut list = Vec::with_capacity(env.len() + 1);
    for (name, value) in env {
        list.push(CString::new(format!("{name}={value}"))?.into_raw());
    }
    list.push(std::ptr::null_mut());
    // SAFETY: the process has one thread that could look at it now. List and texts are never freed.
    unsafe { environ = list.leak().as_mut_ptr() };
    Ok(())
}
