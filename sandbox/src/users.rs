//! Users and groups of a container with a user namespace, who they are outside of it (user_namespaces(7)), and mounts that show
//! files as theirs (idmapped mounts, mount_setattr(2)).

use std::fmt::Write as _;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use oci_spec::runtime::{LinuxIdMapping, Mount, Process, Spec};

use crate::launch;
use crate::root::{Root, RootMount};
use crate::{Error, Result};

/// Numbers from `inside` on are those from `outside` on elsewhere, `size` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    size: u32,
}

impl Range {
    fn outside(self, id: u32) -> Option<u32> {
        let offset = id
            .checked_sub(self.inside)
            .filter(|offset| *offset < self.size)?;
        self.outside.checked_add(offset)
    }
}

/// Who the users and groups of a user namespace are outside of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Users {
    uids: Vec<Range>,
    gids: Vec<Range>,
}

impl Users {
    /// Those of a container. `None` where it has the host's.
    ///
    /// # Errors
    /// One of users and groups is mapped and the other is not, or the container's own user is not mapped.
    pub fn of(spec: &Spec) -> Result<Option<Users>> {
        let linux = spec.linux().as_ref();
        let users = Users::new(
            ranges(linux.and_then(|linux| linux.uid_mappings().as_deref())),
            ranges(linux.and_then(|linux| linux.gid_mappings().as_deref())),
            "linux",
        )?;
        if let (Some(users), Some(process)) = (&users, spec.process()) {
            users.check(process)?;
        }
        Ok(users)
    }

    /// Those that a mount is to show its files as: its own, or where it only says that there are some, the container's.
    fn of_mount(spec: &Spec, mount: &Mount) -> Result<Option<Users>> {
        let (uids, gids) = (mount.uid_mappings(), mount.gid_mappings());
        let own = Users::new(ranges(uids.as_deref()), ranges(gids.as_deref()), "mounts[]")?;
        let asked = mount.options().iter().flatten();
        let asked = asked
            .into_iter()
            .any(|option| option == "idmap" || option == "ridmap");
        if own.is_some() || !asked {
            return Ok(own);
        }
        let container = Users::of(spec)?;
        container.map(Some).ok_or_else(|| {
            Error::spec(
                "mounts[].options",
                format!(
                    "{}: idmap without mappings, in a container that has no users of its own",
                    mount.destination().display()
                ),
            )
        })
    }

    /// The same of a snapshotter's mount: `uidmap=0:65536:65536`, `gidmap=0:65536:65536`, several of them divided by commas.
    fn of_options(options: &[String]) -> Result<Option<Users>> {
        let (mut uids, mut gids) = (Vec::new(), Vec::new());
        for option in options {
            if let Some(ranges) = option.strip_prefix(UIDS) {
                uids = parse(option, ranges)?;
            } else if let Some(ranges) = option.strip_prefix(GIDS) {
                gids = parse(option, ranges)?;
            }
        }
        Users::new(uids, gids, "rootfs[].options")
    }

    fn new(uids: Vec<Range>, gids: Vec<Range>, place: &'static str) -> Result<Option<Users>> {
        let users = Users { uids, gids };
        match (users.uids.is_empty(), users.gids.is_empty()) {
            (true, true) => Ok(None),
            (false, false) => Ok(Some(users)),
            _ => Err(Error::spec(
                place,
                "users and groups are mapped together: uidMappings needs gidMappings, and the other way round",
            )),
        }
    }

    /// Whether all of a process's user and groups are among these.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self, process: &Process) -> Result<()> {
        let user = process.user();
        let further = user.additional_gids().iter().flatten();
        let further = further.map(|gid| ("process.user.additionalGids", *gid, self.gid(*gid)));
        let own = [
            ("process.user.uid", user.uid(), self.uid(user.uid())),
            ("process.user.gid", user.gid(), self.gid(user.gid())),
        ];
        for (field, id, found) in own.into_iter().chain(further) {
            if found.is_none() {
                return Err(Error::spec(
                    field,
                    format!(
                        "{id} is not mapped in the pod's user namespace, which hostUsers: false gives it"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Who this user is outside, if anybody.
    #[must_use]
    pub fn uid(&self, inside: u32) -> Option<u32> {
        self.uids.iter().find_map(|range| range.outside(inside))
    }

    /// Which group this one is outside, if any.
    #[must_use]
    pub fn gid(&self, inside: u32) -> Option<u32> {
        self.gids.iter().find_map(|range| range.outside(inside))
    }

    /// Whether somebody outside is one of these.
    pub(crate) fn has(&self, outside_uid: u32, outside_gid: u32) -> bool {
        let has = |ranges: &[Range], id: u32| {
            ranges.iter().any(|range| {
                id.checked_sub(range.outside)
                    .is_some_and(|offset| offset < range.size)
            })
        };
        has(&self.uids, outside_uid) && has(&self.gids, outside_gid)
    }

    /// What `uid_map` and `gid_map` of a process in the user namespace are to say (user_namespaces(7)).
    pub(crate) fn maps(&self) -> (String, String) {
        (lines(&self.uids), lines(&self.gids))
    }
}

/// Options of a snapshotter's mount.
const UIDS: &str = "uidmap=";
const GIDS: &str = "gidmap=";

/// Whether an option says who the users of a mount are, and so is not the file system's.
pub(crate) fn is_mapping(option: &str) -> bool {
    option.starts_with(UIDS) || option.starts_with(GIDS)
}

fn ranges(list: Option<&[LinuxIdMapping]>) -> Vec<Range> {
    let list = list.unwrap_or_default().iter();
    list.map(|mapping| Range {
        inside: mapping.container_id(),
        outside: mapping.host_id(),
        size: mapping.size(),
    })
    .collect()
}

fn parse(option: &str, ranges: &str) -> Result<Vec<Range>> {
    let range = |text: &str| {
        let numbers: Option<Vec<u32>> = text.split(':').map(|number| number.parse().ok()).collect();
        match numbers?[..] {
            [inside, outside, size] => Some(Range {
                inside,
                outside,
                size,
            }),
            _ => None,
        }
    };
    let ranges: Option<Vec<Range>> = ranges.split(',').map(range).collect();
    ranges.ok_or_else(|| {
        Error::spec(
            "rootfs[].options",
            format!("{option:?}: ranges have the form INSIDE:OUTSIDE:SIZE"),
        )
    })
}

fn lines(ranges: &[Range]) -> String {
    ranges.iter().fold(String::new(), |mut text, range| {
        let Range {
            inside,
            outside,
            size,
        } = range;
        let _ = writeln!(text, "{inside} {outside} {size}");
        text
    })
}

/// User namespaces that mounts take their users from: the kernel takes a namespace, not numbers.
#[derive(Debug, Default)]
pub(crate) struct Maps {
    made: Vec<(Users, OwnedFd)>,
}

impl Maps {
    /// What a container's mounts need. Must be called by a process with one thread.
    ///
    /// # Errors
    /// A mapping is not one, or the kernel refuses it.
    pub(crate) fn of(spec: &Spec, root: &Root) -> Result<Maps> {
        let mut maps = Maps::default();
        if let Root::Mounts { mounts, .. } = root {
            for mount in mounts {
                maps.add(Users::of_options(&mount.options)?)?;
            }
        }
        for mount in spec.mounts().iter().flatten() {
            maps.add(Users::of_mount(spec, mount)?)?;
        }
        Ok(maps)
    }

    fn add(&mut self, users: Option<Users>) -> Result<()> {
        if let Some(users) = users
            && self.get(&users).is_none()
        {
            let made = launch::user_namespace(&users)?;
            self.made.push((users, made));
        }
        Ok(())
    }

    fn get(&self, users: &Users) -> Option<RawFd> {
        let found = self.made.iter().find(|(made, _)| made == users);
        found.map(|(_, namespace)| namespace.as_raw_fd())
    }

    /// Of a snapshotter's mount.
    pub(crate) fn of_root(&self, mount: &RootMount) -> Result<Option<RawFd>> {
        Ok(Users::of_options(&mount.options)?.and_then(|users| self.get(&users)))
    }

    /// Of a mount of the specification.
    pub(crate) fn of_mount(&self, spec: &Spec, mount: &Mount) -> Result<Option<RawFd>> {
        Ok(Users::of_mount(spec, mount)?.and_then(|users| self.get(&users)))
    }

    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.made.iter().map(|(_, namespace)| namespace.as_raw_fd())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn users(options: &[&str]) -> Result<Option<Users>> {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        Users::of_options(&options)
    }

    #[test]
    fn a_user_is_somebody_else_outside_or_nobody() {
        let users = users(&["ro", "uidmap=0:65536:1000,2000:9:1", "gidmap=0:70000:10"]);
        let users = users.unwrap().unwrap();
        assert_eq!(users.uid(0), Some(65_536));
        assert_eq!(users.uid(999), Some(66_535));
        assert_eq!(users.uid(1000), None);
        assert_eq!(users.uid(2000), Some(9));
        assert_eq!(users.gid(9), Some(70_009));
        assert_eq!(
            users.maps(),
            ("0 65536 1000\n2000 9 1\n".into(), "0 70000 10\n".into())
        );
    }

    #[test]
    fn who_is_not_mapped_is_told() {
        let spec = |uid: u32| -> Spec {
            let mapping = json!([{"containerID": 0, "hostID": 65536, "size": 65536}]);
            serde_json::from_value(json!({
                "ociVersion": "1.2.0",
                "linux": {"uidMappings": mapping, "gidMappings": mapping},
                "process": {"cwd": "/", "user": {"uid": uid, "gid": 0}},
            }))
            .unwrap()
        };
        assert!(Users::of(&spec(65_535)).unwrap().is_some());
        let error = Users::of(&spec(65_536)).unwrap_err().to_string();
        assert!(error.starts_with("process.user.uid: 65536 "), "{error}");
        assert!(Users::of(&Spec::default()).unwrap().is_none());
    }

    #[test]
    fn half_a_mapping_and_what_is_none_are_refused() {
        for options in [
            &["uidmap=0:1:1"][..],
            &["uidmap=0:1", "gidmap=0:1:1"],
            &["uidmap=0:1:1:1", "gidmap=0:1:1"],
            &["uidmap=a:b:c", "gidmap=0:1:1"],
            &["uidmap=", "gidmap="],
        ] {
            assert!(users(options).is_err(), "{options:?}");
        }
    }

    proptest! {
        #[test]
        fn any_options_are_ranges_or_refused(list in prop::collection::vec("(uidmap=|gidmap=)([0-9]{1,11}:?){0,4}(,[0-9:]{0,9})?|\\PC{0,8}", 0..4)) {
            if let Ok(Some(users)) = Users::of_options(&list) {
                for id in [0, 1, u32::MAX] {
                    let _ = (users.uid(id), users.gid(id));
                }
            }
        }
    }
}
