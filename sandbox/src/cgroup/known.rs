//! The hierarchies of a machine, remembered between programs: to find them in `mountinfo` takes the kernel longer the more is
//! mounted, and mounts of others wait meanwhile (`namespace_sem`, fs/namespace.c).

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::{Hierarchies, Hierarchy};
use crate::Result;
use crate::error::Step as _;

/// Between the hierarchies that PID 1 is in, and where they were found.
const FOUND: &str = "found:";

impl Hierarchies {
    /// As [`Hierarchies::detect`], from a file if what it says still holds: PID 1 is in the same hierarchies, and each root is
    /// the same directory of the same file system. Otherwise the file is written anew, if that can be.
    ///
    /// # Errors
    /// As [`Hierarchies::detect`].
    pub fn known(file: &Path) -> Result<Self> {
        let init = fs::read_to_string("/proc/1/cgroup").at("read", "/proc/1/cgroup")?;
        let text = fs::read_to_string(file).unwrap_or_default();
        if let Some(known) = recalled(&text, &init) {
            return Ok(known);
        }
        let found = Self::detect()?;
        if let Some(text) = told(&found, &init) {
            // Whoever reads it meanwhile reads the whole of one of both. Whoever cannot keep it finds them again.
            let new = file.with_extension(std::process::id().to_string());
            if let Some(directory) = file.parent() {
                let _ = fs::create_dir_all(directory);
            }
            if fs::write(&new, text)
                .and_then(|()| fs::rename(&new, file))
                .is_err()
            {
                let _ = fs::remove_file(&new);
            }
        }
        Ok(found)
    }
}

fn told(found: &Hierarchies, init: &str) -> Option<String> {
    let mut text = format!("{init}{FOUND}\n");
    for hierarchy in &found.list {
        let root = fs::metadata(&hierarchy.root).ok()?;
        let path = hierarchy
            .root
            .to_str()
            .filter(|path| !path.contains('\n'))?;
        let controllers = hierarchy.controllers.join(",");
        let (device, inode) = (root.dev(), root.ino());
        text.push_str(&format!("{device} {inode} {controllers} {path}\n"));
    }
    Some(text)
}

fn recalled(text: &str, init: &str) -> Option<Hierarchies> {
    let list = text.strip_prefix(init)?.strip_prefix(FOUND)?;
    let list: Option<Vec<Hierarchy>> = list.trim_start().lines().map(still).collect();
    let list = list.filter(|list| !list.is_empty())?;
    let unified = list
        .iter()
        .all(|hierarchy| hierarchy.controllers.is_empty());
    Some(Hierarchies { unified, list })
}

/// A hierarchy that is where the line says.
fn still(line: &str) -> Option<Hierarchy> {
    let mut fields = line.splitn(4, ' ');
    let (device, inode): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let controllers = fields.next()?.split(',').filter(|name| !name.is_empty());
    let controllers = controllers.map(str::to_owned).collect();
    let root = Path::new(fields.next()?);
    let found = fs::metadata(root).ok()?;
    (found.dev() == device && found.ino() == inode && found.is_dir()).then(|| Hierarchy {
        controllers,
        root: root.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("sock-known-{}-{name}", std::process::id()))
    }

    #[test]
    fn what_is_remembered_is_what_was_found() -> Result<()> {
        let file = here("same");
        let found = Hierarchies::detect()?;
        for _ in 0..2 {
            let known = Hierarchies::known(&file)?;
            assert_eq!(known.list, found.list);
            assert_eq!(known.unified, found.unified);
            assert!(file.exists());
        }
        fs::remove_file(&file).at("remove", &file)
    }

    #[test]
    fn what_does_not_hold_any_more_is_found_again() -> Result<()> {
        let file = here("changed");
        let found = Hierarchies::known(&file)?;
        let text = fs::read_to_string(&file).at("read", &file)?;
        let init = fs::read_to_string("/proc/1/cgroup").at("read", "/proc/1/cgroup")?;
        assert!(recalled(&text, &init).is_some(), "{text}");
        let last = text.lines().last().unwrap_or_default();
        let root = found
            .list
            .last()
            .map(|last| last.root.display().to_string());
        let root = root.unwrap_or_default();
        let (inode, elsewhere) = (last.replacen(' ', " 9", 1), last.replace(&root, "/proc"));
        for wrong in [
            String::new(),
            init.clone(),
            format!("{init}{FOUND}\n"),
            text.replace(last, &inode),
            text.replace(last, &elsewhere),
            text.replace(last, &format!("{last}/gone")),
            text.replace(last, "garbage"),
            format!("1:other:/\n{text}"),
            text.replacen(':', ";", 1),
        ] {
            assert!(recalled(&wrong, &init).is_none(), "{wrong}");
            fs::write(&file, &wrong).at("write", &file)?;
            assert_eq!(Hierarchies::known(&file)?.list, found.list);
            let mended = fs::read_to_string(&file).at("read", &file)?;
            assert_eq!(mended, text);
        }
        fs::remove_file(&file).at("remove", &file)
    }

    #[test]
    fn whoever_cannot_keep_it_finds_it_each_time() -> Result<()> {
        let found = Hierarchies::known(Path::new("/proc/nowhere/file"))?;
        assert_eq!(found.list, Hierarchies::detect()?.list);
        Ok(())
    }
}
