//! Users and groups as the container's own /etc/passwd and /etc/group know them.
//!
//! Upstream counterparts: containerd's `oci.WithUser` and `WithAdditionalGIDs`, moby's `user` package.
use crate::spec::UserSpec;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

/// A line of /etc/passwd: (name, uid, gid, home).
fn passwd_line(line: &str) -> Option<(&str, u32, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    Some((name, uid, gid, fields.nth(1).unwrap_or("")))
}

/// A line of /etc/group: (name, gid, members).
fn group_line(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    let gid = fields.nth(1)?.parse().ok()?;
    Some((name, gid, fields.next().unwrap_or("")))
}

pub fn resolve(spec: &UserSpec, passwd: &str, group: &str) -> Result<User, String> {
    let (user_part, group_part) = match spec.image.split_once(':') {
        Some((u, g)) => (u, Some(g).filter(|g| !g.is_empty())),
        None => (spec.image.as_str(), None),
    };
    let entries = || passwd.lines().filter_map(passwd_line);
    let wanted_uid = spec.uid.or_else(|| user_part.parse().ok());
    let entry =
        match wanted_uid {
            Some(uid) => entries().find(|e| e.1 == uid),
            None if user_part.is_empty() => entries().find(|e| e.1 == 0),
            None => Some(entries().find(|e| e.0 == user_part).ok_or_else(|| {
                format!("unable to find user {user_part}: no matching entries in passwd file")
            })?),
        };
    let uid = wanted_uid.or(entry.map(|e| e.1)).unwrap_or(0);
    let groups = || group.lines().filter_map(group_line);
    // With a user from the pod the image's group no longer applies.
    let image_gid = match group_part.filter(|_| spec.uid.is_none()) {
        None => None,
        Some(name) => match name.parse().ok().or_else(|| groups().find(|g| g.0 == name).map(|g| g.1)) {
            Some(gid) => Some(gid),
            None => return Err(format!("unable to find group {name}: no matching entries in group file")),
        },
    };
    let gid = spec.gid.or(image_gid).or(entry.map(|e| e.2)).unwrap_or(0);
    let mut all = vec![gid];
    if !spec.strict
        && let Some((name, ..)) = entry
    {
        all.extend(groups().filter(|g| g.2.split(',').any(|m| m == name)).map(|g| g.1));
    }
    all.extend(&spec.supplemental);
    let mut seen = Vec::new();
    all.retain(|g| {
        !seen.contains(g) && {
            seen.push(*g);
            true
        }
    });
    let home = entry.map_or("", |e| e.3);
    Ok(User { uid, gid, groups: all, home: if home.is_empty() { "/".into() } else { home.into() } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_come_from_the_images_files() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001::/home/web:/bin/sh\nbroken line\n";
        let group = "root:x:0:\nweb:x:1001:\nvideo:x:44:web,other\n";
        let spec = |image: &str, uid, gid, supplemental: &[u32], strict| UserSpec {
            image: image.into(),
            uid,
            gid,
            supplemental: supplemental.to_vec(),
            strict,
        };
        for (given, uid, gid, groups, home) in [
            (spec("", None, None, &[], false), 0, 0, vec![0], "/root"),
            (spec("web", None, None, &[], false), 1000, 1001, vec![1001, 44], "/home/web"),
            (spec("web", None, None, &[7, 44], true), 1000, 1001, vec![1001, 7, 44], "/home/web"),
            (spec("1000:video", None, None, &[], false), 1000, 44, vec![44], "/home/web"),
            (spec("4000", None, None, &[5], false), 4000, 0, vec![0, 5], "/"),
            (spec("web:44", Some(0), None, &[], false), 0, 0, vec![0], "/root"),
            (spec("web", Some(1000), Some(3000), &[], false), 1000, 3000, vec![3000, 44], "/home/web"),
        ] {
            let wanted = User { uid, gid, groups, home: home.into() };
            assert_eq!(resolve(&given, passwd, group), Ok(wanted), "{given:?}");
        }
        assert!(resolve(&spec("nobody", None, None, &[], false), passwd, group).is_err());
        assert!(resolve(&spec("web:none", None, None, &[], false), passwd, group).is_err());
    }
}
